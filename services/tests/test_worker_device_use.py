"""A step's device time over its sequences: nothing is lost, nothing is charged twice."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_fakes import FakeModel, continuation

from kvmesh.backends.base import Estimate, StepTimes
from kvmesh.services.common.sampling import SamplingSettings
from kvmesh.services.worker.device_use import (
    DeviceMeter,
    DeviceUse,
    StepPart,
    split_gap,
    split_step,
)
from kvmesh.services.worker.engine import Engine
from kvmesh.services.worker.limits import Limits
from kvmesh.services.worker.outcome import Outcome
from kvmesh.services.worker.sequence import Sequence, Work

SECONDS = st.floats(0, 1e3, allow_subnormal=False)
RATES = st.floats(0, 1e-2, allow_subnormal=False)
ESTIMATES = st.builds(Estimate, RATES, RATES, RATES, RATES)
PARTS = st.lists(
    st.builds(
        StepPart, st.integers(0, 100_000), st.integers(1, 512), st.booleans(), st.integers(0, 8)
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(PARTS, ESTIMATES, SECONDS, SECONDS, st.none() | SECONDS, SECONDS)
def test_a_step_is_shared_out_whole(
    parts: list[StepPart],
    estimate: Estimate,
    total_s: float,
    seal_s: float,
    simulated_s: float | None,
    idle_s: float,
) -> None:
    times = StepTimes(total_s, min(seal_s, total_s), 1, simulated_s, idle_s)
    uses = split_step(parts, times, estimate)
    expected = total_s if simulated_s is None else simulated_s
    assert sum(sum(use) for use in uses) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert all(min(use) >= 0 for use in uses)


def test_a_step_is_shared_by_what_each_adds_to_it():
    estimate = Estimate(base_s=2.0, prefill_token_s=0.5, decode_token_s=1.0, context_token_s=0.01)
    parts = [StepPart(0, 4, True), StepPart(99, 1, False)]
    # 1 + 4 * 0.5 + 10 * 0.01 = 3.1, and 1 + 1 + 100 * 0.01 = 3; the step took twice that.
    prompt, decode = split_step(parts, StepTimes(total_s=12.2), estimate)
    assert prompt.compute_s == pytest.approx(6.0)
    assert prompt.kv_s == pytest.approx(0.2)
    assert decode.compute_s == pytest.approx(4.0)
    assert decode.kv_s == pytest.approx(2.0)


def test_sealing_is_paid_by_those_whose_blocks_filled():
    parts = [StepPart(0, 128, True, 2), StepPart(63, 1, False, 1), StepPart(5, 1, False)]
    times = StepTimes(total_s=1.0, seal_s=0.3, sealed_blocks=3)
    rest = StepTimes(total_s=0.7)
    sealing = [
        with_seal.kv_s - without.kv_s
        for with_seal, without in zip(
            split_step(parts, times, Estimate()), split_step(parts, rest, Estimate()), strict=True
        )
    ]
    assert sealing == pytest.approx([0.2, 0.1, 0.0])


@settings(deadline=None)
@given(st.lists(st.floats(0, 99), min_size=1, max_size=9), st.floats(0, 99))
def test_a_gap_is_shared_out_whole(since: list[float], free: float) -> None:
    shares = split_gap(since, free, 100.0)
    assert sum(shares) == pytest.approx(100.0 - max(free, min(since)))
    order = sorted(zip(since, shares, strict=True))
    assert all(a[1] >= b[1] - 1e-9 for a, b in itertools.pairwise(order))


@dataclass
class Waiting:
    waiting_since: float
    use: DeviceUse = field(default_factory=DeviceUse)


@settings(deadline=None)
@given(st.data())
def test_requests_add_up_to_the_busy_time(data: st.DataObject) -> None:
    """Over any run of steps and arrivals; a simulated device has no gaps of its own."""
    simulated = data.draw(st.booleans())
    meter, now, expected = DeviceMeter(simulated, 0.0), 0.0, 0.0
    everybody: list[Waiting] = []
    for _ in range(data.draw(st.integers(1, 8))):
        free = now
        now += data.draw(st.floats(0, 5))
        everybody += [Waiting(now)] * data.draw(st.integers(0, 1)) + [Waiting(now)]
        now += data.draw(st.floats(0, 5))
        meter.begin(everybody, now)
        if not simulated:
            expected += now - max(free, min(each.waiting_since for each in everybody))
        took = data.draw(st.floats(0, 5))
        now += took
        parts = [(each, StepPart(data.draw(st.integers(0, 99)), 1, False)) for each in everybody]
        times = StepTimes(total_s=took, simulated_s=took / 100 if simulated else None)
        meter.end(parts, times, Estimate(), now)
        expected += took / 100 if simulated else took
    charged = {id(each): each.use.total_s for each in everybody}
    assert sum(charged.values()) == pytest.approx(expected, abs=1e-9)
    assert meter.busy_s == pytest.approx(expected, abs=1e-9)


def test_an_engine_charges_its_requests_what_its_steps_took():
    model, outcomes = FakeModel(), list[Outcome]()
    clock = itertools.count(0.0, 0.001)
    limits = Limits(slots=4, num_blocks=64, max_context=2048, step_tokens=64)
    engine = Engine(model, limits, outcomes.append, lambda: next(clock))
    prompts = [list(range(11, 11 + size)) for size in (5, 70, 200)]
    for ticket, prompt in enumerate(prompts):
        settings = SamplingSettings(max_tokens=9, ignore_eos=True)
        root = bytes(16)
        engine._submit(Work(ticket, f"r{ticket}", tuple(prompt), len(prompt), settings, root))
    ended: dict[int, Sequence] = {}
    for _ in range(40):
        plan = engine._scheduler.plan(next(clock))
        if plan:
            engine._step(plan)
        for update in engine._scheduler.drain_updates():
            if update.finish is not None:
                ended[update.sequence.work.ticket] = update.sequence
        engine._scheduler.settle()
    assert sorted(ended) == [0, 1, 2]
    for ticket, prompt in enumerate(prompts):
        said = ended[ticket].slice(len(prompt), len(prompt) + 9).tolist()
        assert said == continuation(prompt, 9, eos=None)
    total = sum(sequence.use.total_s for sequence in ended.values())
    assert total == pytest.approx(engine._meter.busy_s)
    steps_s = 0.01 * len(model.forwards)
    assert sum(s.use.total_s - s.use.queue_s for s in ended.values()) == pytest.approx(steps_s)
    assert all(s.use.queue_s > 0 for s in ended.values())
    assert ended[2].use.prefill_s > ended[0].use.prefill_s > 0
