"""One trace per request: every leg in it, in the local store or over OTLP."""

import asyncio
from pathlib import Path

import grpc
import pytest
from kvmesh.integration.traces import find_trace, load_spans
from meshes import inference, mesh_config, prompts, ready
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from kvmesh.integration.launch import LaunchOptions, running_mesh
from kvmesh.integration.launch_state import spans_dir
from kvmesh.integration.loadgen import run_request, token_request
from kvmesh.services.common.config import RouterConfig
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
    config = mesh_config(router=RouterConfig(port=0, handover_min_tokens=64))
    seen: list[inference_pb2.GenerateResponse] = []
    async with running_mesh(config, tmp_path) as mesh, inference(await ready(mesh)) as client:
        result = await run_request(client, long_request(), seen.append)
    assert result.error == ""
    assert result.usage.prefill_worker
    spans = find_trace(load_spans(spans_dir(tmp_path)), seen[-1].trace_id)
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
    # No span per token: the number of spans does not grow with the output.
    assert len(spans) < 40


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


async def test_the_standard_variable_sends_spans_over_otlp(tmp_path: Path) -> None:
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
    seen: list[inference_pb2.GenerateResponse] = []
    try:
        async with (
            running_mesh(mesh_config(), tmp_path, options) as mesh,
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
    assert not list(spans_dir(tmp_path).glob("*.jsonl"))


pytestmark = pytest.mark.timeout(180)
