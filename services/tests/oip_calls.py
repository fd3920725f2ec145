"""Requests of the Open Inference Protocol, written by hand, and a server of it on a random port."""

import json
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from gateway_fakes import FakeMesh, edge_of

from kvmesh.oip import inference_pb2 as pb
from kvmesh.oip import inference_pb2_grpc
from kvmesh.services.common.callers import Callers
from kvmesh.services.common.security import Security
from kvmesh.services.common.server import Listener
from kvmesh.services.gateway.oip.servicer import SERVICE, OipServicer


def with_length(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def raw_request(text: str, **tensors: Any) -> pb.ModelInferRequest:
    """As tritonclient sends it. tensors: a bool is BOOL, a dict is BYTES of JSON."""
    request = pb.ModelInferRequest(model_name="mini", id="call-1")
    for name, value in {"text_input": text, **tensors}.items():
        truth = isinstance(value, bool)
        request.inputs.add(name=name, datatype="BOOL" if truth else "BYTES", shape=[1])
        data = value if isinstance(value, str) else json.dumps(value)
        request.raw_input_contents.append(bytes([value]) if truth else with_length(data.encode()))
    return request


def typed_request(text: str, **tensors: Any) -> pb.ModelInferRequest:
    request = raw_request(text, **tensors)
    del request.raw_input_contents[:]
    for tensor, value in zip(request.inputs, (text, *tensors.values()), strict=True):
        if isinstance(value, bool):
            tensor.contents.bool_contents.append(value)
        else:
            data = value if isinstance(value, str) else json.dumps(value)
            tensor.contents.bytes_contents.append(data.encode())
    return request


def raw_outputs(response: pb.ModelInferResponse) -> dict[str, list[Any]]:
    """The elements of each output, read by the protocol's words alone."""
    assert len(response.outputs) == len(response.raw_output_contents)
    found: dict[str, list[Any]] = {}
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        elements: list[Any] = []
        if output.datatype == "BYTES":
            while data:
                size = int.from_bytes(data[:4], "little")
                elements.append(data[4 : 4 + size].decode())
                data = data[4 + size :]
        else:
            kind = {"FP32": "f", "UINT32": "I"}[output.datatype]
            elements = list(struct.unpack(f"<{len(data) // 4}{kind}", data))
        assert list(output.shape) == [len(elements)]
        found[output.name] = elements
    return found


def parameters(response: pb.ModelInferResponse) -> Mapping[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "")
        for name, value in response.parameters.items()
    }


@asynccontextmanager
async def oip_server(
    mesh: FakeMesh, callers: Callers | None = None
) -> AsyncIterator[tuple[Any, OipServicer]]:
    """A stub and what is behind it."""
    servicer = OipServicer()
    servicer.edge = edge_of(mesh, callers)
    listener = Listener("127.0.0.1", 0, (SERVICE,), mutual=False, callers=callers)
    bound = listener.open(Security())
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, bound.server)
    address = await bound.bind()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield inference_pb2_grpc.GRPCInferenceServiceStub(channel), servicer
    finally:
        await bound.stop(0)
