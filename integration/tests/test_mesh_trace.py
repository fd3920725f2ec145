"""One trace per request: every leg in it, in the local store or over OTLP."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from meshes import inference, mesh_config, prompts, ready
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from kvmesh.integration.launch import LaunchOptions, running_mesh
from kvmesh.integration.launch_plan import RestartPolicy
from kvmesh.integration.launch_state import traces_path
from kvmesh.integration.loadgen import run_request, token_request
from kvmesh.services.common.config import RouterConfig, TelemetryConfig
from kvmesh.services.traces.query import Filter
from kvmesh.services.traces.reader import SpanReader
from kvmesh.services.traces.view import trace_view
from kvmesh.v1 import common_pb2, inference_pb2

LEGS = {
    "chat mini": "router",
    "tokenize": "router",
    "tokenizer encode": "tokenizer",
    "route": "router",
    "worker run": "worker",
    "queue": "worker",
    "kv fetch": "worker",
    "kvcache get": "kvcache",
    "tail fetch": "worker",
    "prefill": "worker",
    "seal": "worker",
    "kv put": "worker",
    "kvcache put": "kvcache",
    "hand-over": "router",
    "decode": "worker",
    "detokenize": "router",
}


def long_request() -> inference_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
    request = inference_pb2.GenerateRequest(sampling=sampling)
    request.chat.messages.add(role="user", content="The old farmer walks near the river. " * 40)
    return request


async def test_every_leg_is_in_the_one_trace(tmp_path: Path) -> None:
    config = mesh_config(
        router=RouterConfig(port=0, handover_min_tokens=64, handover_patience=1000.0)
    )
    seen: list[inference_pb2.GenerateResponse] = []
    async with running_mesh(config, tmp_path) as mesh, inference(await ready(mesh)) as client:
        result = await run_request(client, long_request(), seen.append)
    assert result.error == ""
    assert result.usage.prefill_worker
    with SpanReader(traces_path(tmp_path)) as reader:
        spans = reader.spans(seen[-1].trace_id)
        summary = reader.summary(seen[-1].trace_id)
        assert [t.trace_id for t in reader.newest(Filter(), 10)] == [seen[-1].trace_id]
        assert not [name for name in reader.counters() if name.startswith("dropped")]
    by_id = {span.span_id: span for span in spans}
    roots = [span for span in spans if span.parent_id not in by_id]
    assert [span.name for span in roots] == ["chat mini"]
    found = {span.name: span.service.removeprefix("kvmesh-") for span in spans}
    assert found == LEGS
    root = roots[0].attributes
    assert root["gen_ai.operation.name"] == "chat"
    assert root["gen_ai.request.model"] == "mini"
    assert root["gen_ai.usage.output_tokens"] == 300
    assert root["gen_ai.response.finish_reasons"] == ["length"]
    decode = [span for span in spans if span.name == "decode"][-1]
    assert 0 < len(decode.events) <= 128
    assert summary is not None
    assert (summary.model, summary.output_tokens, summary.clock) == ("mini", 300, "measured")
    view = trace_view(spans, summary, [])
    assert sum(piece["ms"] for piece in view["ttft"]) == pytest.approx(result.usage.ttft_s * 1e3)
    assert {"tokenize", "route", "prefill"} <= {piece["name"] for piece in view["ttft"]}
    assert sum(window["tokens"] for window in view["decode"]) > 100
    assert view["kv"]["stored_raw"] > view["kv"]["stored_wire"] > 0
    assert view["routes"][0]["candidates"][0]["prefill_s"] > 0
    # No span per token: the number of spans does not grow with the output.
    assert len(spans) < 40


async def test_a_receiver_that_dies_in_the_middle_costs_spans_and_no_request(
    tmp_path: Path,
) -> None:
    """What nobody could take is dropped, counted, told to the next receiver, and shown."""
    away = LaunchOptions(policy=RestartPolicy(first_s=4.0))  # longer than a sender tries
    seen: list[inference_pb2.GenerateResponse] = []
    async with (
        running_mesh(mesh_config(), tmp_path, away) as mesh,
        inference(await ready(mesh)) as client,
    ):

        def saw(response: inference_pb2.GenerateResponse) -> None:
            seen.append(response)
            if len(seen) == 20:
                mesh.kill("traces")

        before = await run_request(client, long_request())
        during = await run_request(client, long_request(), saw)
        assert (before.error, during.error, during.text) == ("", "", before.text)
        assert len(seen) > 20
        await mesh.wait_restarted("traces", 1)
        async with asyncio.timeout(60.0):
            while not lost(tmp_path):
                assert (await run_request(client, long_request())).text == before.text
        assert {m: p.restarts for m, p in mesh.members.items() if p.restarts} == {"traces": 1}
        listed = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "kvmesh.cli.main", "trace", "list", "--run-dir", str(tmp_path)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert re.search(r"[1-9]\d* spans? .*dropped", listed.stdout + listed.stderr), listed


def lost(run_dir: Path) -> int:
    with SpanReader(traces_path(run_dir)) as reader:
        return reader.counters().get("dropped_sender", 0)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver that keeps names and trace ids."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}
        self.arrived = asyncio.Event()

    async def Export(self, request, context):  # type: ignore[no-untyped-def]
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.names.setdefault(span.trace_id.hex(), set()).add(span.name)
        self.arrived.set()
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.mark.parametrize("otlp", ["join", "replace"])
async def test_the_standard_variable_joins_or_replaces_the_store(tmp_path: Path, otlp: str) -> None:
    server, collector = grpc.aio.server(), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = LaunchOptions(
        environment={
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_INSECURE": "true",
        }
    )
    config = mesh_config(telemetry=TelemetryConfig(otlp=otlp))
    seen: list[inference_pb2.GenerateResponse] = []
    try:
        async with (
            running_mesh(config, tmp_path, options) as mesh,
            inference(await ready(mesh)) as client,
        ):
            sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
            request = token_request(prompts()[0], sampling)
            assert (await run_request(client, request, seen.append)).error == ""
        # Members flush when they stop, so all spans have arrived.
        names = collector.names[seen[-1].trace_id]
    finally:
        await server.stop(0)
    assert {"chat mini", "route", "worker run", "prefill", "decode"} <= names
    stored = []
    if traces_path(tmp_path).exists():
        with SpanReader(traces_path(tmp_path)) as reader:
            stored = reader.spans(seen[-1].trace_id)
    assert bool(stored) is (otlp == "join")
