"""What requests are told of their cost, end to end: it adds up to what the devices did."""

from pathlib import Path

import pytest
from meshes import mesh_config, prompts, started

from kvmesh.integration.launch import Mesh
from kvmesh.integration.loadgen import closed_loop, token_request
from kvmesh.integration.scrape import scrape
from kvmesh.services.common.config import ModelConfig, RouterConfig, WorkerConfig
from kvmesh.v1 import common_pb2, inference_pb2


def requests(count: int, seed: int = 3, output: int = 12) -> list[inference_pb2.GenerateRequest]:
    params = common_pb2.SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.0)
    return [token_request(ids, params) for ids in prompts(count, seed)]


async def total(mesh: Mesh, name: str) -> float:
    found = await scrape({m.member_id: m.metrics for m in mesh.state().members if m.metrics})
    return found["router"].total(name) or 0.0


async def test_mesh_cost_of_a_disaggregated_load(tmp_path: Path):
    workers = [
        WorkerConfig(role="prefill", price_usd_per_hour=2.0),
        WorkerConfig(role="decode", price_usd_per_hour=0.5),
    ]
    router = RouterConfig(port=0, handover_min_tokens=0)
    config = mesh_config(workers, router=router, model=ModelConfig(codec="k4v4"))
    async with started(config, tmp_path / "run") as (mesh, client):
        results = await closed_loop(client, requests(8), 3)
        seconds = await total(mesh, "kvmesh_device_time_seconds_total")
        dollars = await total(mesh, "kvmesh_cost_total")
    assert [result.error for result in results if result.error] == []
    usages = [result.usage for result in results]
    handed_over = [usage for usage in usages if len(usage.devices) == 2]
    assert handed_over
    for usage in usages:
        assert usage.cost_kind == "measured"
        split, parts = usage.cost_split, 0.0
        for part in (split.queue_usd, split.prefill_usd, split.decode_usd, split.kv_usd):
            assert part > 0
            parts += part
        assert usage.cost_usd == pytest.approx(parts)
        own = [
            (s.queue_s + s.prefill_s + s.decode_s + s.kv_s, s.price_usd_h) for s in usage.devices
        ]
        assert usage.device_s == pytest.approx(sum(each for each, _ in own))
        assert usage.cost_usd == pytest.approx(sum(each * price / 3600 for each, price in own))
    for usage in handed_over:
        prefill, decode = usage.devices
        assert (prefill.worker, prefill.price_usd_h) == ("worker-0", 2.0)
        assert (decode.worker, decode.price_usd_h) == ("worker-1", 0.5)
        assert prefill.decode_s == 0.0 < decode.decode_s
    assert seconds == pytest.approx(sum(usage.device_s for usage in usages))
    assert dollars == pytest.approx(sum(usage.cost_usd for usage in usages))
