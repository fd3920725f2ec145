"""The scheduler under random traffic, on a model that knows only what its pool holds."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st
from worker_fakes import EOS, LAYOUT, FakeModel, continuation

from kvmesh.backends.base import Segment
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.errors import Expired, InvalidRequest, Overloaded
from kvmesh.services.common.sampling import SamplingSettings
from kvmesh.services.kvcache.keys import root_key
from kvmesh.services.worker.limits import Limits, Planned
from kvmesh.services.worker.sampler import sample
from kvmesh.services.worker.scheduler import Scheduler
from kvmesh.services.worker.sequence import (
    Fetched,
    Finish,
    Sequence,
    State,
    Tail,
    Update,
    Work,
)
from kvmesh.services.worker.timeline import MAX_MARKS, Timeline
from kvmesh.services.worker.verified_pool import VerifiedPool

ROOT = root_key(LAYOUT.fingerprint, LAYOUT.codec, BLOCK_SIZE, "")


def work_of(ticket: int, tokens: list[int], max_tokens: int | None = 20, **fields: object) -> Work:
    settings = fields.pop("settings", None) or SamplingSettings(max_tokens=max_tokens)
    assert isinstance(settings, SamplingSettings)
    num_prompt = fields.pop("num_prompt", len(tokens))
    return Work(ticket, f"r{ticket}", tuple(tokens), num_prompt, settings, ROOT, (EOS,), **fields)  # type: ignore[arg-type]


@dataclass
class Bench:
    """A scheduler on a fake model, stepped by hand; one unit of time per step."""

    model: FakeModel
    scheduler: Scheduler
    updates: list[Update]
    plans: list[list[Planned]]
    now: float = 0.0

    def step(self) -> list[Planned]:
        self.now += 1
        plan = self.scheduler.plan(self.now)
        if plan:
            segments = [
                Segment(
                    p.sequence.held_slot,
                    p.start,
                    p.sequence.slice(p.start, p.start + p.count),
                    p.sequence.block_table,
                    p.want_logits,
                )
                for p in plan
            ]
            logits = self.model.forward(segments)
            sampled = sample(logits, [p.sequence.choice() for p in plan if p.want_logits])
            self.scheduler.apply(plan, sampled, self.now)
        self.scheduler.exports(2)
        self.scheduler.settle()
        self.scheduler.check_integrity()
        self.updates += self.scheduler.drain_updates()
        self.plans.append(plan)
        return plan

    def run(self) -> None:
        for _ in range(5000):
            if not self.scheduler.active:
                return
            self.step()
        pytest.fail("it does not come to an end")

    def tokens(self, sequence: Sequence) -> list[int]:
        return [t for u in self.updates if u.sequence is sequence for t in u.tokens]

    def finishes(self, sequence: Sequence) -> list[Finish]:
        return [u.finish for u in self.updates if u.sequence is sequence and u.finish is not None]


def bench(num_blocks: int = 32, slots: int = 4, **limits: int) -> Bench:
    model = FakeModel(num_blocks, slots, max_context=limits.pop("max_context", 1024))
    found = Limits(slots, num_blocks, model.spec.max_context, **limits)
    return Bench(model, Scheduler(found, VerifiedPool(model.pool)), [], [])


def prompt_of(rng: random.Random, most: int) -> list[int]:
    """Random, but often with a prefix that others have too."""
    shared = [i % 11 for i in range(rng.choice([0, 64, 100, 128]))]
    return (shared + [rng.randrange(101) for _ in range(rng.randint(1, 80))])[:most]


@seed(7)
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_every_request_ends_once_with_what_it_would_say_alone(number: int) -> None:
    rng = random.Random(number)
    b = bench(
        num_blocks=rng.randint(5, 16),
        slots=rng.randint(1, 6),
        max_waiting=rng.randint(2, 30),
        step_tokens=rng.choice([64, 96, 300]),
        prefill_chunk=rng.choice([1, 17, 64, 256]),
    )
    note(f"limits {b.scheduler.limits}")
    submitted: list[Sequence] = []
    cancelled: set[Sequence] = set()
    for ticket in range(rng.randint(1, 14)):
        wanted = SamplingSettings(max_tokens=rng.randint(1, 150), ignore_eos=rng.random() < 0.7)
        shards = ("somewhere",) if rng.random() < 0.5 else ()
        work = work_of(
            ticket, prompt_of(rng, 5 * BLOCK_SIZE - 2), settings=wanted, shards=shards,
            prefill_only=rng.random() < 0.1,
        )  # fmt: skip
        try:
            submitted.append(b.scheduler.submit(work, b.now))
        except Overloaded:
            assert b.scheduler.num_waiting >= b.scheduler.limits.max_waiting
        for _ in range(rng.randint(0, 12)):
            for sequence in submitted:
                if sequence.state is State.FETCHING and rng.random() < 0.5:
                    b.scheduler.fetched(sequence, Fetched())
            b.step()
            if submitted and rng.random() < 0.03:
                victim = rng.choice(submitted)
                cancelled.add(victim)
                b.scheduler.cancel(victim, b.now)
            if rng.random() < 0.02:  # a bit flips in some sealed block that nobody uses
                idle = sorted(b.scheduler.cache._unused)
                if idle:
                    b.model.pool.blocks[rng.choice(idle), LAYOUT.header_bytes + 5] ^= 8
    for sequence in submitted:
        b.scheduler.fetched(sequence, Fetched())
    b.run()
    b.step()
    limit = b.scheduler.limits.max_tokens
    for sequence in submitted:
        prompt = list(sequence.work.token_ids)
        most = min(sequence.work.settings.max_tokens or 0, limit - len(prompt))
        most = 1 if sequence.work.prefill_only else most
        eos = None if sequence.work.settings.ignore_eos else EOS
        alone = continuation(prompt, most, eos)
        (finish,) = b.finishes(sequence)
        said = b.tokens(sequence)
        if finish is Finish.CANCELLED:
            assert sequence in cancelled and said == alone[: len(said)]
        else:
            assert said == alone, sequence.work.request_id
            assert finish in (Finish.STOP, Finish.LENGTH, Finish.HANDOVER)
    cache = b.scheduler.cache
    assert cache.num_references == 0 and cache.available == cache.num_blocks


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    b = bench(prefill_chunk=32, step_tokens=128)
    short = b.scheduler.submit(
        work_of(1, [3] * 10, settings=SamplingSettings(max_tokens=100, ignore_eos=True)), 0
    )
    b.step()
    b.scheduler.submit(work_of(2, [5] * 700), 0)
    for _ in range(20):
        plan = b.step()
        assert (short, 1) in [(p.sequence, p.count) for p in plan]
        assert sum(p.count for p in plan if p.sequence is not short) == 32


def test_a_step_stays_within_its_budget() -> None:
    b = bench(num_blocks=64, step_tokens=100, prefill_chunk=64)
    for ticket in range(4):
        b.scheduler.submit(work_of(ticket, [ticket + 1] * 333), 0)
    b.run()
    sizes = [sum(p.count for p in plan) for plan in b.plans]
    assert max(sizes) == 100
    assert sizes[:3] == [100, 100, 100]


def test_preemption_takes_the_youngest_and_loses_nothing() -> None:
    b = bench(num_blocks=5, slots=2)
    wanted = SamplingSettings(max_tokens=140, ignore_eos=True)
    old, young = (b.scheduler.submit(work_of(i, [i] * 100, settings=wanted), 0) for i in (1, 2))
    preempted = None
    while not b.scheduler.counters.preemptions:
        b.step()
    preempted = [s for s in (old, young) if s.state is State.WAITING]
    assert preempted == [young]
    b.run()
    assert b.finishes(old) == b.finishes(young) == [Finish.LENGTH]
    assert b.tokens(old) == continuation([1] * 100, 140, None)
    assert b.tokens(young) == continuation([2] * 100, 140, None)


def test_fetched_blocks_and_tail_are_attended_to_and_bad_ones_are_not() -> None:
    prompt = [i % 90 for i in range(200)]
    source = bench()
    giver = source.scheduler.submit(work_of(1, prompt, max_tokens=2), 0)
    source.step()
    blocks = {i: source.model.pool.export_block(giver.blocks[i]) for i in range(3)}
    tail = Tail(192, 8, source.model.pool.export_tail(giver.held_slot, 8))
    said = source.tokens(giver)[:1]

    def run(fetched: Fetched) -> tuple[int, int]:
        b = bench()
        work = work_of(2, prompt + said, num_prompt=200, shards=("s",), tail_address="t")
        sequence = b.scheduler.submit(work, 0)
        assert sequence.state is State.FETCHING
        assert b.scheduler.missing(sequence) == range(3)
        b.step()
        assert sequence.state is State.FETCHING
        b.scheduler.fetched(sequence, fetched)
        b.run()
        assert said + b.tokens(sequence) == continuation(prompt, 20)
        return sequence.cached_tokens, b.scheduler.counters.checksum_failures

    assert run(Fetched(blocks, tail)) == (200, 0)
    assert run(Fetched(blocks)) == (192, 0)
    assert run(Fetched({}, tail)) == (0, 0)  # a tail is of no use without what is before it
    assert run(Fetched({0: blocks[0], 2: blocks[2]}, tail)) == (64, 0)
    bad = bytearray(blocks[1])
    bad[700] ^= 1
    assert run(Fetched({**blocks, 1: bytes(bad)}, tail)) == (64, 1)
    assert run(Fetched(blocks, Tail(192, 8, b"short"))) == (192, 1)
    assert run(Fetched(blocks, Tail(128, 8, tail.data))) == (192, 0)


def test_a_corrupt_block_takes_all_who_use_it_out_of_the_batch() -> None:
    b = bench()
    prompt = [4] * 150
    wanted = SamplingSettings(max_tokens=60, ignore_eos=True)
    first = b.scheduler.submit(work_of(1, prompt, settings=wanted), 0)
    b.step()
    b.model.pool.blocks[first.blocks[0], 900] ^= 1
    second = b.scheduler.submit(work_of(2, prompt, settings=wanted), 0)
    b.run()
    assert b.tokens(first) == b.tokens(second) == continuation(prompt, 60, None)
    assert b.scheduler.counters.checksum_failures == 1


def test_deadlines_end_requests_wherever_they_are() -> None:
    b = bench(slots=1)
    endless = SamplingSettings(max_tokens=900, ignore_eos=True)
    states = []
    for ticket, shards in ((1, ()), (2, ()), (3, ("s",))):
        work = work_of(ticket, [9] * 70, settings=endless, deadline=5.5, shards=shards)
        states.append(b.scheduler.submit(work, 0))
    assert b.scheduler.next_deadline() == 5.5
    for _ in range(5):
        b.step()
    assert [s.state for s in states] == [State.RUNNING, State.WAITING, State.FETCHING]
    b.step()
    errors = [u.error for u in b.updates if u.finish is Finish.ERROR]
    assert len(errors) == 3 and all(isinstance(e, Expired) for e in errors)
    assert not b.scheduler.has_work and b.scheduler.next_deadline() is None


def test_min_tokens_holds_the_end_back_and_stop_ids_end() -> None:
    b = bench()
    prompt = next(p for p in ([i, 3] for i in range(101)) if continuation(p, 40)[-1:] == [EOS])
    plain = continuation(prompt, 40)
    stop = plain[0]
    found = [
        b.scheduler.submit(work_of(i, prompt, settings=s), 0)
        for i, s in enumerate(
            [
                SamplingSettings(max_tokens=80),
                SamplingSettings(max_tokens=80, stop_token_ids=frozenset([stop])),
                SamplingSettings(max_tokens=80, min_tokens=60),
            ]
        )
    ]
    b.run()
    assert b.tokens(found[0]) == plain
    assert b.tokens(found[1]) == [stop] and b.finishes(found[1]) == [Finish.STOP]
    assert EOS not in b.tokens(found[2])[:60] and len(b.tokens(found[2])) >= 60


def test_the_context_bounds_a_sequence() -> None:
    b = bench(max_context=100)
    sequence = b.scheduler.submit(
        work_of(1, [1] * 90, settings=SamplingSettings(ignore_eos=True)), 0
    )
    b.run()
    assert len(b.tokens(sequence)) == 10 and b.finishes(sequence) == [Finish.LENGTH]
    with pytest.raises(InvalidRequest, match="100 tokens leave no room"):
        b.scheduler.submit(work_of(2, [1] * 100), 0)


def test_marks_of_a_decode_are_few_and_spread() -> None:
    times = Timeline(0)
    for count in range(1, 5000):
        times.mark(float(count), count)
        assert len(times.marks) < MAX_MARKS
    counts = np.array([count for _, count, _ in times.marks])
    assert len(counts) >= MAX_MARKS // 2 - 1
    assert len(set(np.diff(counts))) == 1


def test_a_sequence_ends_once() -> None:
    b = bench()
    sequence = b.scheduler.submit(work_of(1, [1] * 90), 0)
    b.scheduler.cancel(sequence, 1)
    b.scheduler.cancel(sequence, 2)
    b.step()
    assert b.finishes(sequence) == [Finish.CANCELLED]
    with pytest.raises(ValueError, match="already ended as CANCELLED"):
        sequence.end(Finish.STOP, 3)
