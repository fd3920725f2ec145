"""The Open Inference Protocol's gRPC service, over the mesh's public Inference service."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.trace import Span, SpanKind

from kvmesh.oip import inference_pb2 as pb
from kvmesh.oip import inference_pb2_grpc
from kvmesh.services.common import names
from kvmesh.services.common.callers import authorization
from kvmesh.services.common.errors import Expired, MeshError, NotFound, Unavailable
from kvmesh.services.common.telemetry import context_of, extract
from kvmesh.services.gateway.app import Edge, Mesh
from kvmesh.services.gateway.oip.answers import VERSION, InferAnswer
from kvmesh.services.gateway.oip.metadata import model_config, model_metadata, server_metadata
from kvmesh.services.gateway.oip.requests import Inference, read_request
from kvmesh.services.gateway.oip.stream import Emit, InferStream
from kvmesh.services.gateway.streams import merged
from kvmesh.v1 import inference_pb2

SERVICE = "inference.GRPCInferenceService"
STATUS_HEADER = "triton_grpc_error"  # "true": the first error ends a stream, with its status


class OipServicer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """UNAVAILABLE until `edge` is set. active: requests that run."""

    def __init__(self) -> None:
        self.edge: Edge | None = None
        self.active = 0

    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=await self._ready_model(context) is not None)

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Any
    ) -> pb.ModelReadyResponse:
        model = await self._ready_model(context)
        named = model is not None and model.name == request.name
        return pb.ModelReadyResponse(ready=named and request.version in ("", VERSION))

    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:
        return server_metadata()

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Any
    ) -> pb.ModelMetadataResponse:
        return model_metadata(await self._model(request.name, request.version, context))

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Any
    ) -> pb.ModelConfigResponse:
        model = await self._model(request.name, request.version, context)
        return pb.ModelConfigResponse(config=model_config(model))

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Any
    ) -> pb.ModelInferResponse:
        whole = pb.ModelInferResponse()

        async def emit(response: pb.ModelInferResponse) -> None:
            whole.CopyFrom(response)

        await self._infer(request, context, "ModelInfer", emit)
        return whole

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        strict = (STATUS_HEADER, "true") in tuple(context.invocation_metadata() or ())

        async def infer(request: pb.ModelInferRequest, emit: Emit) -> None:
            await self._infer(request, context, "ModelStreamInfer", emit)

        stream = InferStream(infer, strict)
        async with aclosing(stream.responses(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def _infer(
        self, request: pb.ModelInferRequest, context: Any, method: str, emit: Emit
    ) -> None:
        """Runs one request; ModelInfer's has one response. Raises MeshError."""
        edge = self._open()
        self.active += 1
        try:
            with _span(edge, context, method) as span:
                inference = read_request(
                    request, f"oip-{secrets.token_hex(16)}", method == "ModelStreamInfer"
                )
                _check_version(request.model_name, request.model_version)
                span.set_attributes(_attributes(inference))
                limit_s = _least(inference.timeout_s, context.time_remaining())
                try:
                    async with asyncio.timeout(limit_s):
                        await _answer(edge, _mesh(edge, context), inference, emit)
                except TimeoutError:
                    raise Expired(f"the request did not end within {limit_s:g} s") from None
        finally:
            self.active -= 1

    def _open(self) -> Edge:
        if self.edge is None:
            raise Unavailable("the mesh is still starting")
        if self.edge.draining:
            raise Unavailable("this edge drains")
        return self.edge

    async def _ready_model(self, context: Any) -> inference_pb2.ModelInfo | None:
        """None while nothing can run."""
        try:
            models = (await _mesh(self._open(), context).list_models()).models
        except MeshError:
            return None
        return models[0] if models else None

    async def _model(self, name: str, version: str, context: Any) -> inference_pb2.ModelInfo:
        _check_version(name, version)
        edge = self._open()
        try:
            models = (await _mesh(edge, context).list_models()).models
        except MeshError as error:
            raise _public(error, edge.peer) from error
        for model in models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in models) or "none yet"
        raise NotFound(f"no model '{name[:200]}'; this mesh has: {known}")


def _mesh(edge: Edge, context: Any) -> Mesh:
    """The mesh as this caller may use it."""
    if edge.callers.open:
        return edge.mesh
    return edge.mesh.on_behalf(authorization(context.invocation_metadata()))


async def _answer(edge: Edge, mesh: Mesh, inference: Inference, emit: Emit) -> None:
    answer = InferAnswer(inference, edge.vocabulary)
    try:
        async with aclosing(merged(mesh, inference.plan.generate)) as responses:
            async for index, response in responses:
                answer.add(index, response)
                if inference.stream:
                    await emit(answer.piece(index, response))
    except MeshError as error:
        raise _public(error, edge.peer) from error
    if not inference.stream:
        await emit(answer.whole())


def _public(error: MeshError, peer: str) -> MeshError:
    """The same error without the router's address, which a client is not told."""
    error.args = (str(error).removeprefix(f"{peer}: "),)
    return error


def _check_version(model: str, version: str) -> None:
    if version not in ("", VERSION):
        raise NotFound(f"model '{model[:200]}' has version {VERSION}, not '{version[:64]}'")


def _least(*limits: float | None) -> float | None:
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None


@contextmanager
def _span(edge: Edge, context: Any, method: str) -> Iterator[Span]:
    """A server span that continues the caller's trace; what the mesh does is below it."""
    span = edge.telemetry.start(
        f"{SERVICE}/{method}",
        extract(context.invocation_metadata()),
        {names.RPC_SYSTEM: "grpc", names.RPC_SERVICE: SERVICE, names.RPC_METHOD: method},
        kind=SpanKind.SERVER,
    )
    token = otel_context.attach(context_of(span))
    try:
        yield span
    except MeshError as error:
        span.set_attribute(names.ERROR_TYPE, error.code.name)
        raise
    finally:
        otel_context.detach(token)
        span.end()


def _attributes(inference: Inference) -> dict[str, Any]:
    return {
        names.OPERATION: "text_completion",
        names.PROVIDER: "kvmesh",
        names.REQUEST_MODEL: inference.model[:200],
        names.CHOICES: len(inference.plan.generate),
    }
