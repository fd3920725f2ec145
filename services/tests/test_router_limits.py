"""Buckets and tenants' limits: what they promise, over any sequence of requests."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.services.common.api_keys import Limits, Tenant
from kvmesh.services.common.errors import Overloaded
from kvmesh.services.router.limits import Bucket, TenantLimits

steps = st.lists(
    st.tuples(st.floats(0, 90, allow_subnormal=False), st.integers(1, 40)), min_size=1, max_size=60
)


@given(st.integers(1, 30), steps)
def test_no_window_takes_more_than_its_share(per_minute: int, asked: list[tuple[float, int]]):
    bucket, now, taken = Bucket(per_minute, 0.0), 0.0, []
    for pause, amount in asked:
        now += pause
        if bucket.wait_s(amount, now) == 0:
            bucket.take(amount, now)
            taken.append((now, amount))
    for first, (begin, _) in enumerate(taken):
        total = 0
        for at, amount in taken[first:]:
            total += amount
            assert total <= per_minute * (1 + (at - begin) / 60) + 1e-6


@given(st.integers(1, 30), steps)
def test_what_is_refused_is_taken_after_the_time_it_was_told(
    per_minute: int, asked: list[tuple[float, int]]
):
    bucket, now = Bucket(per_minute, 0.0), 0.0
    for pause, wanted in asked:
        now += pause
        amount = min(wanted, per_minute)
        wait_s = bucket.wait_s(amount, now)
        if wait_s > 0:
            assert bucket.wait_s(amount, now + wait_s / 2) > 0  # and not much earlier
            now += wait_s + 1e-6
        assert bucket.wait_s(amount, now) <= 1e-9
        bucket.take(amount, now)
        assert bucket.level(now) >= -1e-6


def test_a_clock_that_stands_still_or_steps_back_gives_nothing():
    bucket = Bucket(60, 10.0)
    bucket.take(60, 10.0)
    assert bucket.level(10.0) == bucket.level(9.0) == 0
    assert bucket.level(11.0) == pytest.approx(1.0)


def test_another_limit_keeps_what_was_taken():
    bucket = Bucket(10, 0.0)
    bucket.take(8, 0.0)
    bucket.resize(20, 0.0)
    assert bucket.level(0.0) == 12
    bucket.resize(5, 0.0)
    assert bucket.level(0.0) == -3


def tenant(**limits: int) -> Tenant:
    return Tenant("acme", Limits(**limits))


def test_concurrency():
    limits, acme = TenantLimits(), tenant(concurrency=2)
    limits.enter(acme, "a", 0.0)
    limits.enter(acme, "b", 0.0)
    with pytest.raises(Overloaded, match="2 requests at once") as caught:
        limits.enter(acme, "c", 0.0)
    assert caught.value.retry_after_s > 0
    limits.enter(replace(acme, name="beta"), "c", 0.0)  # another tenant has its own places
    limits.leave(acme, "a", 10, 1.0, finished=True)
    limits.leave(acme, "a", 10, 1.0, finished=True)  # twice gives one place
    limits.enter(acme, "d", 1.0)
    with pytest.raises(Overloaded):
        limits.enter(acme, "e", 1.0)
    assert limits.states["acme"].refused == {"concurrency": 2}


def test_requests_per_minute_say_when_to_come_again():
    limits, acme = TenantLimits(), tenant(requests_per_minute=2)
    for ticket in "ab":
        limits.enter(acme, ticket, 0.0)
        limits.leave(acme, ticket, 1, 0.0, finished=True)
    with pytest.raises(Overloaded, match="2 requests per minute") as caught:
        limits.enter(acme, "c", 0.0)
    assert caught.value.retry_after_s == pytest.approx(30.0)
    with pytest.raises(Overloaded):
        limits.enter(acme, "c", 29.9)
    limits.enter(acme, "c", 30.0 + 1e-6)


def test_tokens_are_held_and_what_was_not_used_goes_back():
    limits, acme = TenantLimits(), tenant(tokens_per_minute=100)
    limits.enter(acme, "a", 0.0)
    limits.hold(acme, "a", 80, 0.0)
    limits.enter(acme, "b", 0.0)
    with pytest.raises(Overloaded, match="100 tokens per minute") as caught:
        limits.hold(acme, "b", 30, 0.0)
    assert caught.value.retry_after_s == pytest.approx(6.0)  # 10 are missing
    limits.leave(acme, "b", 0, 0.0, finished=False)
    limits.leave(acme, "a", 20, 0.0, finished=True)
    limits.enter(acme, "c", 0.0)
    limits.hold(acme, "c", 80, 0.0)
    assert limits.states["acme"].num_tokens == 20


def test_a_request_over_the_whole_limit_waits_for_a_full_bucket_and_is_owed():
    limits, acme = TenantLimits(), tenant(tokens_per_minute=60)
    limits.enter(acme, "a", 0.0)
    limits.hold(acme, "a", 1000, 0.0)
    limits.leave(acme, "a", 90, 0.0, finished=True)
    with pytest.raises(Overloaded, match="tokens") as caught:
        limits.enter(acme, "b", 0.0)  # before anything is spent on it
    assert caught.value.retry_after_s == pytest.approx(31.0)
    limits.enter(acme, "b", 31.5)


def test_limits_change_while_requests_run():
    limits = TenantLimits()
    limits.enter(tenant(concurrency=1, requests_per_minute=1), "a", 0.0)
    limits.enter(tenant(), "b", 0.0)
    with pytest.raises(Overloaded):
        limits.enter(tenant(concurrency=2), "c", 0.0)
    limits.leave(tenant(tokens_per_minute=10), "a", 4, 0.0, finished=True)
    # A limit that is new starts full, less what ends under it.
    assert limits.states["acme"].tokens is not None
    assert limits.states["acme"].tokens.level(0.0) == 6


events = st.lists(
    st.tuples(st.floats(0, 20, allow_subnormal=False), st.integers(0, 9), st.integers(0, 60)),
    max_size=80,
)


@given(st.integers(1, 3), st.integers(1, 50), events)
def test_tokens_of_finished_requests_stay_within_the_limit(
    concurrency: int, per_minute: int, asked: list[tuple[float, int, int]]
):
    """Whatever comes and goes: places are never over the limit, and tokens held cover the use."""
    limits, now = TenantLimits(), 0.0
    acme = tenant(concurrency=concurrency, tokens_per_minute=per_minute)
    open_: dict[str, int] = {}
    used = 0
    for pause, name, most in asked:
        now += pause
        ticket = str(name)
        if ticket in open_:
            tokens = min(open_.pop(ticket), most)
            used += tokens
            limits.leave(acme, ticket, tokens, now, finished=True)
            continue
        try:
            limits.enter(acme, ticket, now)
        except Overloaded:
            continue
        try:
            limits.hold(acme, ticket, most, now)
        except Overloaded:
            limits.leave(acme, ticket, 0, now, finished=False)
            continue
        open_[ticket] = min(most, per_minute)
        state = limits.states["acme"]
        assert set(state.running) == set(open_) and len(open_) <= concurrency
        assert state.tokens is not None and state.tokens.level(now) >= -1e-6
    assert used <= per_minute * (1 + now / 60) + 1e-6
