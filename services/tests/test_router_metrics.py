"""What a router shows of its requests, over real gRPC and HTTP."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from router_fakes import (
    VOCAB,
    FakeTokenizer,
    FakeWorker,
    MeshOfFakes,
    hear,
    mesh_of,
    tokens,
    until,
)
from scraping import Scraped, one, scraped

from kvmesh.services.common.api_keys import Limits, Tenant
from kvmesh.services.common.errors import InvalidRequest, NotFound, Overloaded
from kvmesh.services.router.metrics import MAX_TENANTS

FIRST = "gen_ai_server_time_to_first_token_seconds"
EACH = "gen_ai_server_time_per_output_token_seconds"
DURATION = "gen_ai_server_request_duration_seconds"
USAGE = "gen_ai_client_token_usage"


def prompt(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(VOCAB) for _ in range(length)]


@asynccontextmanager
async def metered(*fakes: FakeWorker | FakeTokenizer) -> AsyncIterator[tuple[MeshOfFakes, str]]:
    async with mesh_of(*fakes) as mesh:
        meters = mesh.service._context.meters
        try:
            yield mesh, meters.serve(0)
        finally:
            meters.close()


async def read(address: str) -> Scraped:
    return await asyncio.to_thread(scraped, address)


async def test_router_metrics_of_finished_requests():
    async with metered(FakeWorker("worker-0"), FakeTokenizer()) as (mesh, address):
        heard = await hear(mesh.client, tokens(prompt(70), 9))
        single = await hear(mesh.client, tokens(prompt(70), 1))
        found = await read(address)
    usages = [heard.last.usage, single.last.usage]
    labels = {"gen_ai_operation_name": "text_completion", "kvmesh_clock": "measured"}
    assert one(found, f"{FIRST}_count", **labels, gen_ai_request_model="mini") == 2
    assert one(found, f"{FIRST}_sum") == pytest.approx(sum(u.ttft_s for u in usages))
    # An output of one token has no time per token.
    assert one(found, f"{EACH}_count", **labels) == 1
    each = (usages[0].duration_s - usages[0].ttft_s) / 8
    assert one(found, f"{EACH}_sum") == pytest.approx(each)
    assert one(found, f"{DURATION}_count", gen_ai_provider_name="kvmesh") == 2
    assert one(found, f"{USAGE}_sum", gen_ai_token_type="input") == 140
    assert one(found, f"{USAGE}_sum", gen_ai_token_type="output") == 10
    assert one(found, "kvmesh_cache_query_tokens_total") == 140
    assert one(found, "kvmesh_cache_hit_tokens_total") == sum(u.cached_tokens for u in usages)
    assert one(found, "vllm:prefix_cache_queries_total", model_name="mini") == 140
    assert one(found, "vllm:prefix_cache_hits_total") == sum(u.cached_tokens for u in usages)
    where = {"kvmesh_route_kind": "single", "kvmesh_worker": "worker-0"}
    assert one(found, "kvmesh_router_decisions_total", **where) == 2
    assert one(found, "kvmesh_router_members", kvmesh_member_kind="worker") == 1
    assert one(found, "vllm:cache_config_info", block_size="64", model_name="mini") == 1
    assert "kvmesh_cost_total" not in found  # no price is known


async def test_router_metrics_of_failed_requests_name_the_error_and_no_times():
    async with metered(FakeWorker("worker-0"), FakeTokenizer()) as (mesh, address):
        with pytest.raises(InvalidRequest):
            await hear(mesh.client, tokens([VOCAB], 9))
        request = tokens(prompt(70), 9)
        for name in ("made-up-1", "made-up-2"):
            request.model = name
            with pytest.raises(NotFound):
                await hear(mesh.client, request)
        found = await read(address)
    assert one(found, f"{DURATION}_count", error_type="InvalidRequest") == 1
    # What a caller makes up must not become a label.
    assert one(found, f"{DURATION}_count", error_type="NotFound", gen_ai_request_model="") == 2
    assert f"{FIRST}_count" not in found
    assert one(found, "kvmesh_cache_query_tokens_total") == 0


async def test_router_metrics_of_requests_that_run_and_of_abandoned_ones():
    worker = FakeWorker("worker-0")
    worker.pause_after = 2
    async with metered(worker, FakeTokenizer()) as (mesh, address):
        stream = mesh.client.generate(tokens(prompt(70), 9))
        await anext(stream)
        assert one(await read(address), "kvmesh_router_requests_active") == 1
        await stream.aclose()
        await until(lambda: mesh.service.parts.admission.active == 0, "the request is gone")
        found = await read(address)
    assert one(found, f"{DURATION}_count", error_type="Cancelled") == 1
    assert f"{FIRST}_count" not in found


async def test_router_metrics_of_a_request_that_was_handed_over():
    prefill, decode = FakeWorker("worker-0", "prefill"), FakeWorker("worker-1", "decode")
    async with metered(prefill, decode, FakeTokenizer()) as (mesh, address):
        await hear(mesh.client, tokens(prompt(300), 4))
        found = await read(address)
    where = {"kvmesh_route_kind": "handover", "kvmesh_worker": "worker-1"}
    assert one(found, "kvmesh_router_decisions_total", **where) == 1


async def test_tenants_have_a_bounded_number_of_labels():
    async with metered(FakeWorker("worker-0"), FakeTokenizer()) as (mesh, address):
        assert "kvmesh_tenant_requests_total" not in await read(address)
        limits = mesh.service.parts.limits
        for number in range(MAX_TENANTS + 5):
            tenant = Tenant(f"tenant-{number}", Limits(requests_per_minute=1))
            limits.enter(tenant, "a", 0.0)
            with pytest.raises(Overloaded):
                limits.enter(tenant, "b", 0.0)
        found = await read(address)
    requests = found["kvmesh_tenant_requests_total"]
    assert len(requests) == MAX_TENANTS + 1
    assert one(found, "kvmesh_tenant_requests_total", kvmesh_tenant="tenant-0") == 1
    assert one(found, "kvmesh_tenant_requests_total", kvmesh_tenant="_other") == 5
    assert one(found, "kvmesh_tenant_requests_active", kvmesh_tenant="_other") == 5
    refused = {"kvmesh_tenant": "_other", "kvmesh_tenant_limit": "requests"}
    assert one(found, "kvmesh_tenant_requests_refused_total", **refused) == 5
