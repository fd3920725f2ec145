"""The simulated mesh: what it decides, what it measures, and that it does so the same way twice."""

from dataclasses import replace

import pytest

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.base import Estimate
from kvmesh.backends.cost.parallel import Parallel
from kvmesh.backends.devices import load_device
from kvmesh.integration.simulate import (
    ClosedLoop,
    Failure,
    Optimisations,
    Overheads,
    Scenario,
    WorkerPool,
    load_of,
    simulate,
)
from kvmesh.integration.workload import (
    Shape,
    TraceRequest,
    Workload,
    closed_loop_load,
    poisson_load,
)

MODEL = load_shape("llama-3.1-8b")
H100 = load_device("h100")
ONE = Scenario(MODEL, H100)
# A step takes 10 ms, 1 ms per prompt token and 2 ms per decoding sequence: easy to work out.
PLAIN = replace(ONE, estimate=Estimate(0.010, 0.001, 0.002, 0.0), kv_blocks=100)
R1 = load_shape("deepseek-r1")
GB300 = load_device("gb300")
APART = Scenario(
    R1,
    GB300,
    (
        WorkerPool(2, Parallel(1, 2, 2), "prefill"),
        WorkerPool(2, Parallel(1, 4, 4), "decode", slots=32),
    ),
    Optimisations(kv="fp8", acceptance=(0.8, 0.6, 0.4)),
    weights="nvfp4",
)


def requests(*lengths: tuple[float, int, int]) -> Workload:
    """(arrival, prompt, output) of each; no two share a block."""
    return Workload(
        tuple(TraceRequest(at, n, out, (i,)) for i, (at, n, out) in enumerate(lengths)), 512
    )


def test_one_request_takes_what_its_steps_take() -> None:
    result = simulate(PLAIN, requests((1.0, 100, 5)))
    (record,) = result.records
    assert result.simulated
    assert record.arrival_s == 1.0
    assert record.ttft_s == pytest.approx(0.010 + 0.100)
    assert record.tpot_s == pytest.approx(0.012)
    assert record.duration_s == pytest.approx(0.110 + 4 * 0.012)
    assert record.longest_gap_s == pytest.approx(0.012)
    assert result.itl.p50 == pytest.approx(0.012)
    assert result.pools[0].busy == pytest.approx(1.0)


def test_who_comes_later_waits_for_the_step_under_way() -> None:
    result = simulate(PLAIN, requests((0.0, 100, 100), (0.115, 50, 2)))
    first, second = result.records
    # The first one's step from 0.110 to 0.122, then one with the prompt of 50.
    assert second.first_token_s == pytest.approx(0.122 + 0.010 + 0.050 + 0.002)
    assert first.longest_gap_s == pytest.approx(0.062)


def test_overheads_come_on_top() -> None:
    slow = replace(PLAIN, overheads=Overheads(request_s=0.5, token_s=0.25))
    (record,) = simulate(slow, requests((0.0, 100, 5))).records
    assert record.ttft_s == pytest.approx(0.5 + 0.110 + 0.25)
    assert record.tpot_s == pytest.approx(0.012)


def test_a_shared_prefix_is_computed_once() -> None:
    shared = Workload(tuple(TraceRequest(i * 10.0, 1024, 2, (7, 8 + i)) for i in range(3)), 512)
    result = simulate(PLAIN, shared)
    assert [record.cached_tokens for record in result.records] == [0, 512, 512]
    assert result.records[1].ttft_s == pytest.approx(0.010 + 0.512)
    assert result.prefix_hits == pytest.approx(1 / 3)
    apart = simulate(PLAIN, load_of(shared, MODEL.max_context, share_prefixes=False))
    assert apart.prefix_hits == 0


def test_kv_aware_routing_finds_more_prefixes_than_chance() -> None:
    load = poisson_load(Shape(1088, 4, 1024, 8), 20, 120, 3)
    hits = {}
    for policy in ("kv-aware", "random", "round-robin", "least-loaded"):
        options = Optimisations(policy=policy)
        scenario = replace(ONE, pools=(WorkerPool(8),), options=options)
        result = simulate(scenario, load, seed=5)
        assert result.finished == 120
        hits[policy] = result.prefix_hits
    assert hits["kv-aware"] > max(hits["random"], hits["round-robin"]) + 0.05


@pytest.mark.parametrize("scenario", [ONE, APART], ids=["aggregated", "apart"])
def test_two_runs_are_identical(scenario: Scenario) -> None:
    load = poisson_load(Shape(900, 60, 512, 3), 30, 80, 9)
    assert simulate(scenario, load, seed=4) == simulate(scenario, load, seed=4)


def test_the_seed_decides_what_is_drawn() -> None:
    load = poisson_load(Shape(900, 60), 30, 80, 9)
    assert simulate(APART, load, seed=4).tpot != simulate(APART, load, seed=5).tpot


def test_prefill_hands_over_to_decode() -> None:
    load = poisson_load(Shape(1000, 50), 10, 40, 2)
    result = simulate(APART, load)
    assert result.finished == 40
    for record in result.records:
        assert record.prefill_worker.startswith("prefill-")
        assert record.decode_worker.startswith("decode-")
        assert record.transfer is not None
        begin, end = record.transfer
        moved = R1.kv_bytes(960, "fp8") + R1.kv_elements_per_token * 40 * 2
        assert end - begin == pytest.approx(moved / GB300.scale_up.bandwidth_bytes_s.value)
        assert record.first_token_s is not None and record.first_token_s <= begin
        assert record.output_tokens == 50
    slow = replace(APART, transfer_bytes_s=1e7)
    assert simulate(slow, load).duration.p50 > result.duration.p50  # type: ignore[operator]


def test_drafts_give_more_tokens_per_step() -> None:
    load = closed_loop_load(Shape(64, 400), 8, 1)
    loop = load_of(load, R1.max_context, ClosedLoop(8))
    plain = replace(APART, options=replace(APART.options, acceptance=()))
    with_drafts, without = simulate(APART, loop), simulate(plain, loop)
    assert with_drafts.output_tokens == without.output_tokens == 3200
    assert with_drafts.tpot.p50 < without.tpot.p50  # type: ignore[operator]


def test_a_dead_worker_s_requests_go_on_elsewhere() -> None:
    load = poisson_load(Shape(500, 200), 20, 60, 6)
    pools = (WorkerPool(3),)
    whole = simulate(replace(ONE, pools=pools), load)
    failed = simulate(replace(ONE, pools=pools, failures=(Failure("worker-1", 1.5, 0.5),)), load)
    assert whole.migrations == 0 and failed.migrations > 0
    assert failed.finished == 60
    assert failed.output_tokens == whole.output_tokens == 60 * 200
    assert failed.duration.p99 > whole.duration.p99  # type: ignore[operator]


def test_a_mesh_without_workers_says_so() -> None:
    load = requests((0.0, 100, 50), (1.0, 100, 50))
    result = simulate(replace(PLAIN, failures=(Failure("worker-0", 0.3),)), load)
    assert result.finished == 0
    assert result.errors == {"Unavailable": 2}


def test_a_pipeline_keeps_its_stages_busy() -> None:
    model = load_shape("llama-3.1-70b")
    loop = load_of(closed_loop_load(Shape(200, 50), 64, 1), model.max_context, ClosedLoop(32))
    staged = Scenario(model, H100, (WorkerPool(1, Parallel(tensor=2, pipeline=4)),), weights="fp8")
    result = simulate(staged, loop)
    assert result.finished == 64
    assert 0.5 < result.pools[0].busy <= 1.0
