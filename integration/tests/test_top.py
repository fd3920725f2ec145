"""What `kvmesh top` makes of two looks at a mesh."""

import itertools
import random

import numpy as np
import pytest

from kvmesh.integration.scrape import (
    Samples,
    grown,
    grown_buckets,
    parse,
    quantile,
    scrape,
)
from kvmesh.integration.top import FIRST_TOKEN, PER_TOKEN, Look, mesh_view
from kvmesh.services.common.metrics import Meters, Metric
from kvmesh.services.router.bill import Bill
from kvmesh.services.router.request_metrics import FIRST_TOKEN_S, RequestEnd, RequestMetrics
from kvmesh.v1 import inference_pb2, mesh_pb2, worker_pb2

ROUTER = """\
kvmesh_cache_query_tokens_total {query}
kvmesh_cache_hit_tokens_total {hit}
gen_ai_client_token_usage_sum{{gen_ai_token_type="input"}} {query}
gen_ai_client_token_usage_sum{{gen_ai_token_type="output",kvmesh_clock="measured"}} {output}
gen_ai_server_request_duration_seconds_count {count}
gen_ai_server_time_to_first_token_seconds_count{{kvmesh_clock="measured"}} {count}
gen_ai_server_time_to_first_token_seconds_bucket{{kvmesh_clock="measured",le="0.1"}} {fast}
gen_ai_server_time_to_first_token_seconds_bucket{{kvmesh_clock="measured",le="0.2"}} {count}
gen_ai_server_time_to_first_token_seconds_bucket{{kvmesh_clock="measured",le="+Inf"}} {count}
"""
WORKER = """\
kvmesh_worker_tokens_generated_total {tokens}
kvmesh_worker_tokens_prefilled_total 0
kvmesh_worker_steps_total {steps}
kvmesh_worker_steps_sequences_total {tokens}
kvmesh_worker_preemptions_total 3
kvmesh_kv_checksum_failures_total 1
"""
SHARD = """\
kvmesh_kvcache_blocks 7
kvmesh_kvcache_hits_total {hits}
kvmesh_kvcache_misses_total 10
kvmesh_kv_moved_bytes_total{{kvmesh_kv_direction="in"}} {moved}
kvmesh_kv_moved_bytes_total{{kvmesh_kv_direction="out"}} 0
"""


def status(uptime_s: float) -> inference_pb2.MeshStatusResponse:
    members = [
        inference_pb2.MemberStatus(member_id="router", kind="router"),
        inference_pb2.MemberStatus(
            member_id="worker-0", kind="worker", role="both", running=2, waiting=1,
            blocks_total=100, blocks_free=60,
        ),
        inference_pb2.MemberStatus(member_id="kvcache-0", kind="kvcache"),
    ]  # fmt: skip
    return inference_pb2.MeshStatusResponse(members=members, uptime_s=uptime_s)


def look(at: float, router: dict[str, float], worker: dict[str, float], hits: int = 0) -> Look:
    samples = {
        "router": parse(ROUTER.format(**router)),
        "worker-0": parse(WORKER.format(**worker)),
        "kvcache-0": parse(SHARD.format(hits=hits, moved=hits * 1000)),
    }
    return Look(at, status(at), samples)


EARLY = look(
    100.0, {"query": 100, "hit": 0, "output": 50, "count": 10, "fast": 0},
    {"tokens": 1000, "steps": 100}, hits=10,
)  # fmt: skip
LATE = look(
    110.0, {"query": 300, "hit": 150, "output": 90, "count": 20, "fast": 10},
    {"tokens": 1500, "steps": 200}, hits=40,
)  # fmt: skip


def test_top_shows_what_came_between_two_looks():
    view = mesh_view(LATE, EARLY, EARLY)
    assert (view.window_s, view.rate_s, view.waiting) == (10.0, 10.0, 1)
    assert view.requests_per_s == 1.0
    assert view.output_tokens_per_s == 50.0
    assert view.hit_rate == 0.75
    (served,) = view.served
    assert served.usd_per_million_tokens is None
    # All ten of the window were below 0.1 s, though those before it were not.
    assert served.ttft is not None
    assert (served.ttft.p50_s, served.ttft.count) == (pytest.approx(0.05), 10)
    assert served.tpot is None
    (worker,) = view.workers
    assert (worker.output_tokens_per_s, worker.batch) == (50.0, 5.0)
    assert (worker.blocks_used, worker.preemptions, worker.checksum_failures) == (40, 3, 1)
    (shard,) = view.shards
    assert (shard.blocks, shard.hit_rate, shard.in_bytes_per_s) == (7, 1.0, 3000.0)
    assert shard.bytes_used is None
    assert view.unread == ()


def test_top_without_an_earlier_look_is_since_the_start():
    view = mesh_view(LATE)
    assert view.window_s == view.rate_s == 110.0
    assert view.output_tokens_per_s == pytest.approx(1500 / 110)
    (served,) = view.served
    assert served.ttft is not None
    assert served.ttft.count == 20


def test_top_price_of_a_million_tokens():
    priced = parse(ROUTER.format(query=1, hit=0, output=2000, count=1, fast=1))
    dollars = [({"kvmesh_clock": "measured"}, 0.004), ({"kvmesh_clock": "simulated"}, 9.0)]
    cost = {**priced.values, "kvmesh_cost_total": dollars}
    view = mesh_view(Look(1.0, status(1.0), {"router": Samples(cost)}))
    (served,) = view.served
    assert served.usd_per_million_tokens == pytest.approx(2.0)  # the other clock's do not count


def test_top_of_a_mesh_whose_metrics_cannot_be_read_knows_what_the_router_says():
    view = mesh_view(Look(5.0, status(5.0)))
    assert view.unread == ("router", "worker-0", "kvcache-0")
    assert (view.output_tokens_per_s, view.hit_rate, view.served) == (None, None, ())
    (worker,) = view.workers
    assert (worker.running, worker.waiting, worker.batch) == (2, 1, None)
    assert view.shards[0].blocks is None


def test_top_a_member_that_restarted_counts_from_zero():
    after = look(
        110.0, {"query": 30, "hit": 3, "output": 9, "count": 2, "fast": 2},
        {"tokens": 30, "steps": 3}, hits=1,
    )  # fmt: skip
    view = mesh_view(after, EARLY, EARLY)
    assert view.output_tokens_per_s == 3.0
    assert view.hit_rate == pytest.approx(0.1)
    assert view.served[0].ttft is not None
    assert view.served[0].ttft.count == 2
    assert grown(5, 3) == 3
    assert grown(None, 3) == 3
    assert grown(5, None) == 0
    assert grown_buckets({1.0: 5, 2.0: 9}, {1.0: 4, 2.0: 9}) == {1.0: 4, 2.0: 9}


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_top_quantile_is_within_the_bucket_that_holds_it(share: float):
    rng = random.Random(5)
    values = [rng.expovariate(8.0) for _ in range(3000)]
    bounds = [0.0, *FIRST_TOKEN_S]
    buckets = {bound: float(sum(v <= bound for v in values)) for bound in FIRST_TOKEN_S}
    buckets[float("inf")] = float(len(values))
    exact = float(np.quantile(values, share, method="inverted_cdf"))
    lower, upper = next(b for b in itertools.pairwise(bounds) if b[0] <= exact <= b[1])
    found = quantile(buckets, share)
    assert found is not None
    assert lower <= found <= upper


def test_top_quantile_at_the_ends():
    assert quantile({}, 0.5) is None
    assert quantile({1.0: 0.0, float("inf"): 0.0}, 0.5) is None
    # Above the last finite bound nothing is known but that.
    assert quantile({1.0: 0.0, float("inf"): 4.0}, 0.5) == 1.0
    assert quantile({1.0: 2.0, 2.0: 2.0, float("inf"): 2.0}, 1.0) == 1.0


async def test_top_reads_what_the_router_records():
    """The names here and there must be the same."""
    meters = Meters("router", "router")
    try:
        requests = RequestMetrics(meters)
        for simulated in (False, True):
            usage = inference_pb2.Usage(
                prompt_tokens=8, completion_tokens=11, ttft_s=0.02, duration_s=0.12,
                simulated_ttft_s=0.02, simulated_duration_s=0.12,
            )  # fmt: skip
            bill = Bill()
            bill.arrive(mesh_pb2.Member(simulated=simulated, devices=2, price_usd_h=1.8))
            bill.note(worker_pb2.DeviceSeconds(decode_s=1.0, simulated_s=0.12))
            bill.fill(usage)
            requests.ended(RequestEnd("chat", "mini", usage, 0.12, ""))
        costs = requests.counts.cost_usd
        points = [(value, {"kvmesh.clock": clock}) for clock, value in costs.items()]
        meters.counters([Metric("kvmesh.cost", "{USD}", "x", lambda: points)])
        found = await scrape({"router": meters.serve(0), "gone": "127.0.0.1:1"})
    finally:
        meters.close()
    assert set(found) == {"router"}
    assert found["router"].label_values(f"{PER_TOKEN}_count", "kvmesh_clock") == {
        "measured",
        "simulated",
    }
    view = mesh_view(Look(1.0, status(10.0), found))
    assert [served.clock for served in view.served] == ["measured", "simulated"]
    for served in view.served:  # never summed
        assert served.ttft is not None
        assert served.tpot is not None
        assert served.ttft.count == served.tpot.count == 1
        assert 0.015 <= served.ttft.p50_s <= 0.02
        assert 0.008 <= served.tpot.p50_s <= 0.01
    assert view.requests_per_s == pytest.approx(0.2)
    for served in view.served:
        assert served.usd_per_million_tokens == pytest.approx(0.001 / 11 * 1e6)
    assert found["router"].buckets(FIRST_TOKEN)[float("inf")] == 2.0
