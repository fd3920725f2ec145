"""The simulated mesh: what it decides, what it measures, and that it does so the same way twice."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.base import Estimate
from kvmesh.backends.cost.parallel import Parallel
from kvmesh.backends.devices import load_device
from kvmesh.backends.errors import DoesNotFit
from kvmesh.integration.mlperf.schedule import arrivals
from kvmesh.integration.serve_report import Limits
from kvmesh.integration.simulate import (
    ClosedLoop,
    Failure,
    Optimisations,
    Overheads,
    Scenario,
    ScenarioError,
    WorkerPool,
    load_of,
    simulate,
)
from kvmesh.integration.simulate.layout import read_failure, read_pool
from kvmesh.integration.simulate.search import Search, find_max_qps
from kvmesh.integration.simulate.source import Amount, from_named, from_shape
from kvmesh.integration.simulate.verdict import judge
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


def test_a_first_token_may_be_under_way_longer() -> None:
    slow = replace(PLAIN, overheads=Overheads(token_s=0.01, first_token_s=0.04))
    (record,) = simulate(slow, requests((0.0, 100, 5))).records
    assert record.ttft_s == pytest.approx(0.110 + 0.04)
    assert record.duration_s == pytest.approx(0.110 + 4 * 0.012 + 0.01)


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


def test_the_highest_rate_lies_between_what_is_kept_and_what_is_not() -> None:
    limits = Limits(ttft_s=2.0)
    source = from_shape(Shape(256, 8), 1.0, Amount(60, 20.0), 3, MODEL.max_context)
    found = find_max_qps(Search(PLAIN, source.at, limits, precision=1.1))
    assert found.best is not None and found.over is not None
    assert found.best.qps < found.over.qps <= 1.1 * found.best.qps
    assert found.best.verdict.met and not found.over.verdict.met
    # A prompt takes at least 0.256 s of the one worker: more than 3.9/s cannot be for long.
    assert 1.0 < found.best.qps < 5
    assert "TTFT p99" in found.over.verdict.binding and "busy" in found.over.verdict.binding


def test_a_limit_that_no_rate_keeps_is_said_to_bind() -> None:
    source = from_shape(Shape(256, 8), 1.0, Amount(20), 3, MODEL.max_context)
    found = find_max_qps(Search(PLAIN, source.at, Limits(tpot_s=0.001), start_qps=0.1))
    assert found.best is None and found.over is not None
    assert found.over.verdict.checks[0].name == "TPOT"
    with pytest.raises(ScenarioError, match="no limit is given"):
        find_max_qps(Search(PLAIN, source.at, Limits()))


def test_full_kv_memory_is_named_as_the_cause() -> None:
    crowded = replace(PLAIN, kv_blocks=6)
    load = load_of(closed_loop_load(Shape(128, 64), 20, 1), MODEL.max_context, ClosedLoop(20))
    verdict = judge(simulate(crowded, load), Limits(ttft_s=0.2))
    assert not verdict.met
    assert "KV memory is full (384 tokens per rank)" in verdict.binding


def test_the_three_windows() -> None:
    # One short request arrives last and ends first.
    result = simulate(PLAIN, requests((0.0, 10, 400), (1.0, 10, 2)))
    last = result.records[1]
    assert last.end_s is not None
    assert result.legacy.seconds == pytest.approx(last.end_s)
    assert result.native.seconds == pytest.approx(result.seconds)
    assert result.legacy.tokens == result.native.tokens == 402
    assert result.legacy.tokens_per_s > result.native.tokens_per_s
    # In between it decodes alone: a token each 12 ms.
    assert result.steady.tokens_per_s == pytest.approx(1 / 0.012, rel=0.02)
    assert result.native.tokens_per_s_device == pytest.approx(result.native.tokens_per_s)


@pytest.mark.parametrize(
    ("text", "devices"), [("3", 3), ("16xtp4", 64), ("4xdep16", 64), ("2xtp8,pp2", 32)]
)
def test_pools_are_read(text: str, devices: int) -> None:
    assert read_pool(text).devices == devices


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: read_pool("axtp4"), "'a' is no number"),
        (lambda: read_pool("2xtp0"), "parallel.tensor is 0, must be at least 1"),
        (lambda: read_pool("2xzz4"), "'zz4' is not understood"),
        (lambda: read_pool("2xtp4pp2"), "several by commas, as in 2xtp8,pp2"),
        (lambda: WorkerPool(0), r"workers is 0, must be in 1\.\.4096"),
        (lambda: WorkerPool(role="x"), "role is 'x', must be one of both, prefill, decode"),  # type: ignore[arg-type]
        (lambda: Optimisations(policy="x"), "policy is 'x', must be one of kv-aware"),
        (lambda: Optimisations(acceptance=(0.5, 1.5)), r"draft 2 is 1.5, must be in \[0, 1\]"),
        (lambda: replace(ONE, transfer_bytes_s=-1.0), "transfer_bytes_s is -1, must be greater"),
        (lambda: replace(ONE, pools=()), "pools is empty"),
        (lambda: replace(ONE, pools=(WorkerPool(role="prefill"),)), "every pool has role prefill"),
        (lambda: replace(ONE, link="usb"), "link is 'usb', must be one of scale-up, scale-out"),
        (lambda: replace(ONE, device=None), "device is missing"),
        (lambda: read_failure("w1"), "'w1' is not understood"),
        (lambda: read_failure("w1@soon"), "'soon' is no number of seconds"),
        (lambda: Overheads(request_s=-1), "overheads.request_s is -1, must be at least 0"),
        (
            lambda: simulate(
                replace(ONE, failures=(Failure("worker-7", 1.0),)), requests((0, 5, 5))
            ),
            "no worker is named 'worker-7'; there are worker-0",
        ),
        (lambda: simulate(ONE, requests((0, 10**6, 5))), "no request fits the context of 131072"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ScenarioError, match=told):
        make()


def test_a_model_that_does_not_fit_says_what_would_hold_it() -> None:
    with pytest.raises(DoesNotFit, match=r"llama-3.1-405b .* does not fit 1, \d+ would hold it"):
        simulate(replace(ONE, model=load_shape("llama-3.1-405b")), requests((0.0, 10, 10)))


def test_balanced_ranks_give_more_tokens() -> None:
    """Under full load, with prompts of very different lengths, at the cost of the first token."""
    rng = random.Random(1)
    lengths = [(0.0, rng.choice([100, 300, 3000]), rng.randint(20, 200)) for _ in range(200)]
    loop = load_of(requests(*lengths), R1.max_context, ClosedLoop(64))
    pools = (WorkerPool(1, Parallel(1, 4, 4), slots=16),)
    base = Scenario(R1, GB300, pools, Optimisations(kv="fp8"), weights="nvfp4")
    balanced = simulate(base, loop)
    in_turn = simulate(replace(base, options=replace(base.options, balance=False)), loop)
    assert balanced.steady.tokens_per_s > 1.05 * in_turn.steady.tokens_per_s


def test_a_load_of_mlperf_comes_at_loadgens_times() -> None:
    source = from_named("mlperf-llama-3.1-8b:server", 20.0, Amount(50), 1, MODEL.max_context)
    load = source.load()
    assert [request.arrival_s for request in load.requests] == arrivals(20.0, 50).tolist()
    assert source.limits == Limits(ttft_s=2.0, tpot_s=0.1)
    assert len({key for request in load.requests for key in request.keys}) == sum(
        len(request.keys) for request in load.requests
    )
    with pytest.raises(ScenarioError, match="rate is missing"):
        from_named("mlperf-llama-3.1-8b:server", None, Amount(50), 1, MODEL.max_context)
