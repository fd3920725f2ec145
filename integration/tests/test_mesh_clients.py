"""One mesh of processes, seen by its clients: Python, JSON by reflection, scrapers, load, top."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from meshes import mesh_config, prompts, ready
from typer.testing import CliRunner

from kvmesh.cli.main import app
from kvmesh.client import AsyncClient, Client, InvalidRequest, chat, tokens
from kvmesh.integration.launch import Mesh, running_mesh
from kvmesh.integration.scrape import Samples, scrape
from kvmesh.services.common.config import ModelConfig, TelemetryConfig, WorkerConfig

TRACE_LINES = 6


async def kvmesh(run_dir: Path, *arguments: str) -> Any:
    """What a command prints, as JSON documents; it runs in a thread, with a loop of its own."""
    line = [*arguments, "--run-dir", str(run_dir)]
    done = await asyncio.to_thread(CliRunner().invoke, app, line)
    assert done.exit_code == 0, done.output
    return [json.loads(text) for text in done.stdout.splitlines()]


def endpoints(mesh: Mesh) -> dict[str, str]:
    return {m.member_id: m.metrics for m in mesh.state().members if m.member_id != "traces"}


async def check_clients(mesh: Mesh) -> None:
    """Both clients get the same tokens, with and without streaming."""
    request = tokens(prompts(1)[0], max_tokens=12, temperature=1.0, seed=5, echo_token_ids=True)

    def synchronous() -> list[int]:
        with Client(mesh.public_address) as client:
            assert client.models()[0].name == "mini"
            assert client.route(request).candidates[0].chosen
            assert client.status().members[0].kind == "router"
            streamed = [i for piece in client.stream(request) for i in piece.token_ids]
            assert client.generate(request).token_ids == streamed
            return streamed

    async with AsyncClient(mesh.public_address) as client:
        answer = await client.generate(request)
        assert answer.token_ids == await asyncio.to_thread(synchronous)
        assert len(answer.token_ids) == 12
        assert answer.finish_reason == "length"
        assert (await client.generate(chat("Hello", max_tokens=2))).usage is not None
        with pytest.raises(InvalidRequest):
            await client.generate(tokens([1 << 30]))


async def check_reflection(mesh: Mesh) -> None:
    (services,) = await kvmesh(mesh.run_dir, "grpc", "ls", "--json")
    assert "kvmesh.v1.Inference" in services
    body = json.dumps({"text": "Hello", "sampling": {"max_tokens": 3, "ignore_eos": True}})
    said = await kvmesh(mesh.run_dir, "grpc", "call", "kvmesh.v1.Inference/Generate", body)
    assert said[-1]["finish_reason"] == "FINISH_REASON_LENGTH"
    assert said[-1]["usage"]["completion_tokens"] == 3
    (health,) = await kvmesh(mesh.run_dir, "grpc", "health", "--json")
    assert health == {"service": "", "status": "SERVING"}


async def check_load(mesh: Mesh, folder: Path) -> None:
    """A closed loop with a shared prefix, then a trace; nothing fails, and all is accounted for."""
    (closed,) = await kvmesh(
        mesh.run_dir, "bench", "serve", "--json", "--requests", "6", "--concurrency", "2",
        "--prompt-tokens", "200", "--shared-tokens", "128", "--output-tokens", "5",
    )  # fmt: skip
    said = closed["report"]
    assert (said["finished"], said["errors"]) == (6, {})
    assert (said["input_tokens"], said["output_tokens"]) == (1200, 30)
    # The first two may both miss; the others find the prefix on the worker.
    assert said["cached_tokens"] >= 4 * 128
    assert closed["clock"] == "measured"
    trace = folder / "trace.jsonl"
    record = {"input_length": 1500, "output_length": 40, "hash_ids": [7, 8, 9]}
    trace.write_text(
        "".join(json.dumps({"timestamp": 50 * n, **record}) + "\n" for n in range(TRACE_LINES))
    )
    (replayed,) = await kvmesh(
        mesh.run_dir, "bench", "serve", "--json", "--trace", str(trace), "--scale", "0.1"
    )
    said = replayed["report"]
    assert said["finished"] == TRACE_LINES
    assert said["input_tokens"] == TRACE_LINES * 150
    assert said["output_tokens"] == TRACE_LINES * 4
    assert said["seconds"] >= 0.05 * (TRACE_LINES - 1)


def check_metrics(found: dict[str, Samples]) -> None:
    """What the processes counted is what was asked of them, here and there."""
    router, worker = found["router"], found["worker-0"]
    output = router.total("gen_ai_client_token_usage_sum", gen_ai_token_type="output")
    probe = 1
    assert worker.total("kvmesh_worker_tokens_generated_total") == output + probe
    # The worker also counts the prompt that was refused never, and its own probe of one token.
    queries = router.total("vllm:prefix_cache_queries_total")
    assert worker.total("vllm:prefix_cache_queries_total") == queries + probe
    hits = router.total("vllm:prefix_cache_hits_total")
    assert worker.total("vllm:prefix_cache_hits_total") == hits
    assert hits > 0
    assert worker.total("vllm:num_requests_running") == 0
    assert worker.total("vllm:cache_config_info", block_size="64", cache_dtype="k4v4") == 1
    assert router.total("kvmesh_router_decisions_total", kvmesh_route_kind="single") > 0
    assert worker.total("kvmesh_worker_steps_total") > 0
    shards = [found["kvcache-0"], found["kvcache-1"]]
    stored = sum(shard.total("kvmesh_kv_moved_bytes_total") or 0 for shard in shards)
    assert stored == worker.total("kvmesh_kv_moved_bytes_total") > 0
    assert found["tokenizer"].total("kvmesh_tokenizer_prompts_total") >= 2


async def check_top(mesh: Mesh) -> None:
    (view,) = await kvmesh(mesh.run_dir, "top", "--once", "--json")
    assert view["unread"] == []
    assert view["output_tokens_per_s"] > 0
    (served,) = view["served"]
    assert served["usd_per_million_tokens"] > 0
    assert served["clock"] == "measured"
    assert 0 < served["ttft"]["p50_s"] <= served["ttft"]["p99_s"]
    assert served["tpot"]["count"] > 0
    assert 0 < view["hit_rate"] < 1
    (shown,) = await kvmesh(mesh.run_dir, "status", "--json")
    assert {m["member_id"]: m["metrics"] for m in shown["members"]} == endpoints(mesh)


async def test_mesh_clients(tmp_path: Path):
    config = mesh_config([WorkerConfig(role="both")], model=ModelConfig(codec="k4v4"))
    async with running_mesh(config, tmp_path / "run") as mesh:
        await ready(mesh)
        await check_clients(mesh)
        await check_reflection(mesh)
        await check_load(mesh, tmp_path)
        check_metrics(await scrape(endpoints(mesh)))
        await check_top(mesh)
        before = endpoints(mesh)
        assert all(address.startswith("127.0.0.1:") for address in before.values())
        mesh.kill("worker-0")
        await mesh.wait_restarted("worker-0", 1)
        assert endpoints(mesh) == before  # who scrapes finds it again
        again = (await scrape(before))["worker-0"]
        assert again.total("kvmesh_worker_tokens_generated_total") == 1


async def test_mesh_without_metrics_has_no_endpoint(tmp_path: Path):
    config = mesh_config([WorkerConfig(role="both")], telemetry=TelemetryConfig(metrics=False))
    async with running_mesh(config, tmp_path / "run") as mesh:
        await mesh.wait_for(lambda: bool(mesh.public_address), 60.0)
        assert set(endpoints(mesh).values()) == {""}
