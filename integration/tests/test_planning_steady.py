"""The steady state against brute force: a batch run step by step, written here on its own."""

import math

import numpy as np
import pytest

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.cost.memory import plan_memory
from kvmesh.backends.cost.parallel import Formats, Options, Parallel
from kvmesh.backends.cost.shapes import StepWork
from kvmesh.backends.cost.step import StepCost
from kvmesh.backends.devices import load_device
from kvmesh.integration.planning.lengths import Lengths
from kvmesh.integration.planning.steady import Limits, SteadyState, Traffic
from kvmesh.integration.simulate import (
    ClosedLoop,
    Optimisations,
    Scenario,
    WorkerPool,
    load_of,
    simulate,
)
from kvmesh.integration.workload import TraceRequest, Workload

OUTPUTS = Lengths(kind="log_normal", median=150, sigma=0.9, low=5, high=1500)
INPUTS = Lengths(kind="log_normal", median=400, sigma=0.5, low=20, high=2000)


@pytest.fixture(scope="module")
def cost() -> StepCost:
    return StepCost(load_device("b200"), load_shape("llama-3.1-8b"), formats=Formats("fp8", "fp8"))


def test_moments_are_those_of_the_distribution():
    free = Lengths(kind="log_normal", median=100, sigma=0.5)
    assert free.mean == pytest.approx(100 * math.exp(0.125), rel=0.002)
    assert free.square == pytest.approx(100**2 * math.exp(0.5), rel=0.01)
    assert Lengths.of(80).biased == pytest.approx(40)
    shares, done = Lengths.of(80).left(np.array([0.0, 20.0, 80.0]))
    assert shares == pytest.approx([1, 0.75, 0])
    assert done[:2] == pytest.approx([40, 30])
    scaled = Lengths(kind="quantiles", points=((0, 10), (0.5, 100), (1, 1000)), mean_tokens=200)
    assert scaled.mean == pytest.approx(200, rel=0.05)
    assert scaled.longest <= 1000


def test_draws_follow_the_quantiles():
    drawn = OUTPUTS.draw(np.random.default_rng(3), 20_000)
    assert drawn.mean() == pytest.approx(OUTPUTS.mean, rel=0.03)
    assert np.median(drawn) == pytest.approx(150, rel=0.03)
    assert drawn.min() >= 5 and drawn.max() <= 1500


def run(cost: StepCost, batch: int, samples: int, seed: int) -> tuple[float, float]:
    """(tokens/s once the batch has mixed, tokens/s of the whole run): each step every sequence
    gets a token, and those that end are replaced by prompts of that step."""
    rng = np.random.default_rng(seed)
    prompts, outputs = INPUTS.draw(rng, samples), OUTPUTS.draw(rng, samples)
    queue = iter(zip(prompts.tolist(), outputs.tolist(), strict=True))
    running: list[list[int]] = []  # [context, tokens left]
    now = tokens = 0.0
    mixed: tuple[float, float] | None = None
    last = (0.0, 0.0)
    more = True
    while True:
        fresh = []
        while more and len(running) + len(fresh) < batch:
            pair = next(queue, None)
            if pair is None:
                more = False
                last = now, tokens
                break
            fresh.append(pair)
        if not running and not fresh:
            break
        now += cost.seconds(StepWork.of([(0, p) for p, _ in fresh], [c + 1 for c, _ in running]))
        for sequence in running:
            sequence[0] += 1
            sequence[1] -= 1
        tokens += len(running) + len(fresh)
        running += [[p, left - 1] for p, left in fresh]
        running = [sequence for sequence in running if sequence[1] > 0]
        if mixed is None and tokens > 4 * batch * OUTPUTS.mean:
            mixed = now, tokens
    assert mixed is not None
    return (last[1] - mixed[1]) / (last[0] - mixed[0]), tokens / now


@pytest.mark.parametrize("seed", [1, 2])
def test_throughput_is_that_of_a_batch_run_step_by_step(cost: StepCost, seed: int):
    batch, samples = 64, 1500
    state = SteadyState(cost, Traffic(INPUTS, OUTPUTS), Limits(sequences=batch))
    steady, whole = state.offline(samples)
    mixed, run_s = run(cost, batch, samples, seed)
    assert steady.binds == "sequences"
    assert steady.tokens_s_device == pytest.approx(mixed, rel=0.04)
    assert whole == pytest.approx(run_s, rel=0.05)


def test_memory_binds_a_long_context(cost: StepCost):
    traffic = Traffic(Lengths.of(20_000), Lengths.of(200))
    state = SteadyState(cost, traffic, Limits())
    most, binds = state.most()
    memory = plan_memory(cost.device, cost.model, formats=Formats("fp8", "fp8"))
    assert binds == "memory" or most < memory.sequences(20_100)
    assert most <= memory.kv_bytes / memory.sequence_bytes(20_100) + 1e-6


def test_step_tokens_bind_long_prompts(cost: StepCost):
    state = SteadyState(cost, Traffic(Lengths.of(900), Lengths.of(100)), Limits(step_tokens=1000))
    # Each sequence takes 1 token and 900 / 100 of prompt per step.
    assert state.most() == (pytest.approx(100), "step_tokens")


def test_load_follows_littles_law(cost: StepCost):
    state = SteadyState(cost, Traffic(INPUTS, OUTPUTS), Limits())
    steady = state.under(20.0)
    assert steady.output_tokens_s == pytest.approx(20 * OUTPUTS.mean, rel=1e-3)
    assert steady.sequences == pytest.approx(20 * OUTPUTS.mean * steady.tpot_s, rel=1e-3)
    assert state.under(1e9) == state.full()


def test_a_pipeline_holds_a_batch_per_stage():
    cost = StepCost(
        load_device("b200"),
        load_shape("llama-3.1-405b"),
        Parallel(tensor=2, pipeline=2),
        Formats("nvfp4", "fp8"),
    )
    state = SteadyState(cost, Traffic(Lengths.of(1000), Lengths.of(500)), Limits())
    steady = state.at(64)
    stage = StepWork.of([], [1250] * 32)
    assert steady.step_s >= cost.step(stage).latency_s
    assert steady.output_tokens_s == pytest.approx(64 / steady.step_s)


def test_placed_experts_are_even_and_few_at_small_batches():
    model = load_shape("deepseek-r1")
    layout, formats = Parallel(data=8, expert=8), Formats("nvfp4", "fp8")
    costs = {
        routing: StepCost(load_device("gb300"), model, layout, formats, Options(routing))
        for routing in ("balanced", "placed", "power_law")
    }
    many = {name: cost.seconds(StepWork.of((), [1000] * 1024)) for name, cost in costs.items()}
    assert many["placed"] == pytest.approx(many["balanced"], rel=0.02)
    assert many["power_law"] > 1.1 * many["placed"]
    few = {name: cost.seconds(StepWork.of((), [1000] * 2)) for name, cost in costs.items()}
    assert few["placed"] < few["power_law"] and few["placed"] < few["balanced"]


def test_an_all_reduce_can_hide_under_a_product():
    model = load_shape("llama-3.1-70b")
    work = StepWork.of([(0, 4096)])
    apart, under = (
        StepCost(load_device("b200"), model, Parallel(tensor=2), options=Options(overlap=overlap))
        for overlap in (False, True)
    )
    hidden = apart.step(work).by_name()["all_reduce"]
    assert "all_reduce" not in under.step(work).by_name()
    assert 0 < apart.seconds(work) - under.seconds(work) <= hidden * 1.001


def test_experts_outputs_can_travel_in_fp8():
    model = load_shape("deepseek-r1")
    layout, formats = Parallel(data=8, expert=8), Formats("nvfp4", "fp8")
    work = StepWork.of((), [1000] * 512)
    wide, narrow = (
        StepCost(load_device("gb300"), model, layout, formats, Options(exchange=exchange))
        for exchange in ("bf16", "fp8")
    )
    assert narrow.step(work).by_name()["combine"] < wide.step(work).by_name()["combine"]
    assert narrow.step(work).by_name()["dispatch"] == wide.step(work).by_name()["dispatch"]


@pytest.mark.parametrize("in_flight", [16, 64])
def test_the_simulator_agrees(in_flight: int):
    """Two ways to the same figure: a closed loop through real schedulers, and the steady state."""
    device, model, count = load_device("h100"), load_shape("llama-3.1-8b"), 800
    rng = np.random.default_rng(0)
    lengths = zip(INPUTS.draw(rng, count).tolist(), OUTPUTS.draw(rng, count).tolist(), strict=True)
    requests = tuple(TraceRequest(0.0, i, o, tuple(range(-(-i // 64)))) for i, o in lengths)
    scenario = Scenario(model, device, (WorkerPool(slots=in_flight),), Optimisations("fp8"), "fp8")
    load = load_of(Workload(requests, 64), model.max_context, ClosedLoop(in_flight), False)
    found = simulate(scenario, load, 1)
    cost = StepCost(device, model, formats=Formats("fp8", "fp8"))
    steady = SteadyState(cost, Traffic(INPUTS, OUTPUTS), Limits(in_flight)).at(in_flight)
    assert found.steady.tokens_per_s == pytest.approx(steady.output_tokens_s, rel=0.06)
    assert found.tpot.mean == pytest.approx(steady.tpot_s, rel=0.06)
