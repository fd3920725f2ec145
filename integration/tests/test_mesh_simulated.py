"""Meshes on devices that are not here: the CPU's tokens, the devices' times, a trace of each."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from meshes import mesh_config, prompts, started

from kvmesh.integration.launch import Mesh
from kvmesh.integration.launch_state import traces_path
from kvmesh.integration.loadgen import RequestResult, closed_loop, token_request
from kvmesh.services.common import names
from kvmesh.services.common.config import (
    GatewayConfig,
    MeshConfig,
    ModelConfig,
    WorkerConfig,
    load_config,
)
from kvmesh.services.traces.reader import SpanReader
from kvmesh.services.traces.spans import Span
from kvmesh.v1 import common_pb2, inference_pb2

DEPLOY = Path(__file__).parents[2] / "deploy"
CODEC = ModelConfig(codec="k4v4")


def deployed(name: str) -> MeshConfig:
    """A mesh file as it is, but for ports, the edge, and the codec that all meshes here share."""
    config = load_config(DEPLOY / name)
    router = config.router.model_copy(update={"port": 0})
    edge = GatewayConfig(enabled=False)
    return config.model_copy(update={"router": router, "gateway": edge, "model": CODEC})


def requests() -> list[inference_pb2.GenerateRequest]:
    made = []
    for number, ids in enumerate(prompts(6, 11)):
        params = common_pb2.SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.0)
        if number % 2:
            params.temperature, params.seed = 1.2, number
        made.append(token_request(ids, params))
    return made


async def served(config: MeshConfig, run_dir: Path) -> tuple[list[RequestResult], list[Span]]:
    async with started(config, run_dir) as (mesh, client):
        results = await closed_loop(client, requests(), 2)
        await check_status(mesh, config)
    assert [result.error for result in results if result.error] == []
    with SpanReader(traces_path(run_dir)) as reader:
        found = reader.find("last")
        twin = [trace.trace_id for trace in reader.linked(found) if trace.clock == "simulated"]
        if not twin:
            with pytest.raises(LookupError, match="no simulated times"):
                reader.simulated(found)
            return results, []
        assert reader.simulated(found) == twin[0]
        back = [trace.trace_id for trace in reader.linked(twin[0])]
        assert back == [found]
        measured, spans = reader.spans(found), reader.spans(twin[0])
    assert not any(span.simulated for span in measured)
    assert all(span.simulated for span in spans)
    assert all(span.resource[names.CLOCK] == "simulated" for span in spans)
    return results, spans


async def check_status(mesh: Mesh, config: MeshConfig) -> None:
    from kvmesh.client import AsyncClient

    async with AsyncClient(mesh.public_address) as client:
        status = await client.status()
    workers = [member for member in status.members if member.kind == "worker"]
    assert len(workers) == len(config.workers)
    for member, worker in zip(workers, config.workers, strict=True):
        assert member.simulated == (worker.backend != "cpu")
        assert member.devices >= 1 and member.price_usd_h > 0 and member.price_source


def check_twin(spans: Sequence[Span], usage: inference_pb2.Usage) -> None:
    """The simulated trace is as long as the usage says, and its parts lie in their order."""
    roots = [span for span in spans if span.parent_id is None]
    (root,) = roots
    length_s = (root.end_ns - root.start_ns) / 1e9
    assert length_s == pytest.approx(root.attributes[names.SIMULATED_DURATION], abs=1e-6)
    assert root.attributes[names.COST_KIND] == "simulated"
    runs = sorted((s for s in spans if s.name == names.SPAN_WORKER), key=lambda s: s.start_ns)
    assert runs[0].start_ns == root.start_ns
    assert runs[-1].end_ns == pytest.approx(root.end_ns, abs=1000)
    for before, after in itertools.pairwise(runs):
        assert after.start_ns == pytest.approx(before.end_ns, abs=1000)
    assert len(runs) == len(usage.devices)
    for run in runs:
        parts = {span.name: span for span in spans if span.parent_id == run.span_id}
        order = (names.SPAN_KV_FETCH, names.SPAN_QUEUE, names.SPAN_PREFILL, names.SPAN_DECODE)
        at = run.start_ns
        for part in (parts[name] for name in order if name in parts):
            assert part.start_ns == pytest.approx(at, abs=1000)
            at = part.end_ns
        assert at == pytest.approx(run.end_ns, abs=1000)


def tokens_of(results: Sequence[RequestResult]) -> list[list[int]]:
    return [result.token_ids for result in results]


async def test_mesh_simulated_tokens_are_the_cpus(tmp_path: Path):
    cpu = mesh_config([WorkerConfig(role="both")], model=CODEC)
    expected, nothing = await served(cpu, tmp_path / "cpu")
    assert nothing == []
    assert {result.usage.cost_kind for result in expected} == {"measured"}

    results, spans = await served(deployed("gpu-lpu.toml"), tmp_path / "gpu-lpu")
    assert tokens_of(results) == tokens_of(expected)
    check_gpu_and_lpu(results, spans)

    results, spans = await served(deployed("attention-ffn.toml"), tmp_path / "split")
    assert tokens_of(results) == tokens_of(expected)
    for result in results:
        (stay,) = result.usage.devices
        assert "Rubin" in stay.device and "LPU" in stay.device
        assert result.usage.cost_kind == "simulated"
        assert 0 < result.usage.simulated_ttft_s < result.usage.simulated_duration_s
    check_twin(spans, results[-1].usage)


def check_gpu_and_lpu(results: Sequence[RequestResult], spans: Sequence[Span]) -> None:
    """Prefill on the GPU, decode on the LPU, and the KV between them takes time by its bytes."""
    handed_over = [result.usage for result in results if len(result.usage.devices) == 2]
    assert handed_over
    for usage in handed_over:
        gpu, lpu = usage.devices
        assert "B200" in gpu.device and "LPU" in lpu.device
        assert (gpu.simulated, lpu.simulated) == (True, True)
        assert gpu.prefill_s > 0 == gpu.decode_s
        assert lpu.decode_s > 0
        own = [
            each.count * each.price_usd_h / 3600
            * (each.queue_s + each.prefill_s + each.decode_s + each.kv_s)
            for each in usage.devices
        ]  # fmt: skip
        assert usage.cost_usd == pytest.approx(sum(own))
        busy = [e.queue_s + e.prefill_s + e.decode_s + e.kv_s for e in usage.devices]
        # Alone or not, a request's time by the clocks is never less than its shares of the steps.
        assert usage.simulated_duration_s >= sum(busy)
        assert 0 < usage.simulated_ttft_s < usage.simulated_duration_s
    check_twin(spans, results[-1].usage)
    moved = [span for span in spans if span.name == names.SPAN_KV_FETCH]
    for span in moved:
        seconds = (span.end_ns - span.start_ns) / 1e9
        slower = 5e10  # the B200's network card; an LPU chip's four global links have 8.7e10
        assert seconds == pytest.approx(1e-5 + span.attributes[names.BYTES] / slower, abs=2e-9)
    assert moved
