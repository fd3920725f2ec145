"""The Open Inference Protocol's edge of a mesh: by generated stubs, and by Triton's client."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from meshes import inference, issue, mesh_config, prompts, ready

from kvmesh.integration.launch import Mesh, running_mesh
from kvmesh.integration.launch_state import read_state, traces_path
from kvmesh.integration.loadgen import run_request
from kvmesh.oip import inference_pb2 as pb
from kvmesh.oip import inference_pb2_grpc
from kvmesh.services.common.config import GatewayConfig, WorkerConfig
from kvmesh.services.router.client import InferenceClient
from kvmesh.services.traces.query import Filter
from kvmesh.services.traces.reader import SpanReader
from kvmesh.v1 import common_pb2, inference_pb2

TRITON_PYTHON = Path(sys.prefix) / "oip-client" / "bin" / "python"  # made by `make oip-client`
SAMPLING = {"temperature": 1.0, "seed": 11, "max_tokens": 20, "ignore_eos": True}


@asynccontextmanager
async def oip_mesh(run_dir: Path, **parts: Any) -> AsyncIterator[Mesh]:
    gateway = GatewayConfig(port=0, oip_port=0)
    config = mesh_config([WorkerConfig(role="both")], gateway=gateway, **parts)
    async with running_mesh(config, run_dir) as mesh:
        yield await ready(mesh)


def request(text: str, sampling: dict[str, Any], **switches: bool) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="mini", id="x")
    for name, value in (("text_input", text), ("sampling_parameters", json.dumps(sampling))):
        tensor = made.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(value.encode())
    for name, switch in switches.items():
        tensor = made.inputs.add(name=name, datatype="BOOL", shape=[1])
        tensor.contents.bool_contents.append(switch)
    return made


def text_of(response: pb.ModelInferResponse) -> str:
    return response.outputs[0].contents.bytes_contents[0].decode()


async def said_directly(mesh: Mesh, text: str) -> str:
    asked = inference_pb2.GenerateRequest(text=text)
    asked.sampling.MergeFrom(
        common_pb2.SamplingParams(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)
    )
    async with inference(mesh) as client:
        return (await run_request(client, asked)).text


async def held(client: InferenceClient) -> tuple[int, int]:
    status = await client.status()
    return sum(m.blocks_total - m.blocks_free for m in status.members), status.requests_active


async def test_the_protocol_says_what_direct_grpc_says_and_leaves_nothing(tmp_path: Path) -> None:
    async with oip_mesh(tmp_path) as mesh:
        state = read_state(tmp_path)
        assert state is not None and state.oip_address == mesh.oip_address
        async with inference(mesh) as client:
            members = (await client.status()).members
        others = [m.other_addresses for m in members if m.kind == "gateway"]
        assert list(others[0]) == [f"oip://{mesh.oip_address}"]
        said = await said_directly(mesh, "The old")
        async with grpc.aio.insecure_channel(mesh.oip_address) as channel:
            stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            await same_text(stub, said)
            await refused(stub)
            async with inference(mesh) as client:
                await abandoned(client, stub)
    with SpanReader(traces_path(tmp_path)) as reader:
        newest = reader.newest(Filter(), 50)
        spans = [span for summary in newest for span in reader.spans(summary.trace_id)]
    roots = [s for s in spans if s.name == "inference.GRPCInferenceService/ModelInfer"]
    assert roots and "The old" not in json.dumps([s.attributes for s in spans])
    assert {"chat mini", "worker run"} <= {
        s.name for s in spans if s.trace_id == roots[-1].trace_id
    }


async def same_text(stub: Any, said: str) -> None:
    whole = await stub.ModelInfer(request("The old", SAMPLING, exclude_input_in_output=True))
    assert text_of(whole) == said
    assert whole.outputs[1].contents.bytes_contents[0] == b"length"
    pieces = stub.ModelStreamInfer(iter([request("The old", SAMPLING, stream=True)]))
    texts = [text_of(piece.infer_response) async for piece in pieces]
    assert len(texts) > 1 and "".join(texts) == said


async def refused(stub: Any) -> None:
    long = request("word " * 20_000, SAMPLING)
    for wrong, code in (
        (request("x", {"logit_bias": {"99999": 1}}), grpc.StatusCode.INVALID_ARGUMENT),
        (long, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(wrong)
        assert caught.value.code() is code, caught.value.details()
    other = request("x", SAMPLING)
    other.model_name = "gpt-none"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(other)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def abandoned(client: InferenceClient, stub: Any) -> None:
    """A stream whose client goes away, and a request whose deadline passes, free their blocks."""
    long = {"max_tokens": 7000, "ignore_eos": True, "temperature": 0}
    text = "".join(chr(97 + token % 26) for token in prompts()[0])
    call = stub.ModelStreamInfer()
    for _ in range(3):
        await call.write(request(text, long, stream=True))
    while not (await held(client))[0]:
        await call.read()
    call.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request(text, long), timeout=1.0)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # It takes less than a second, but a busy machine may be slow.
    async with asyncio.timeout(20.0):
        while await held(client) != (0, 0):
            await asyncio.sleep(0.05)


@pytest.mark.skipif(not TRITON_PYTHON.exists(), reason="no Triton client; run 'make oip-client'")
async def test_triton_client_unchanged(tmp_path: Path) -> None:
    """With TLS and a token, as an edge that others can reach has them."""
    secure = issue(tmp_path)
    async with oip_mesh(tmp_path / "run", security=secure) as mesh:
        script = Path(__file__).parent / "triton_client_script.py"
        done = await asyncio.to_thread(
            subprocess.run,
            [TRITON_PYTHON, script, mesh.oip_address, tmp_path / "ca.pem", "s3cret-token"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
