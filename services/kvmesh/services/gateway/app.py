"""The HTTP edge as an ASGI app: OpenAI's endpoints over the mesh's public Inference service."""

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from opentelemetry import trace
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvmesh.services.common import names
from kvmesh.services.common.callers import Callers
from kvmesh.services.common.config import GatewayConfig
from kvmesh.services.common.metrics import Meters
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.services.gateway.answers import (
    Answer,
    ChatAnswer,
    Choice,
    CompletionAnswer,
    Head,
    usage_of,
)
from kvmesh.services.gateway.errors import INVALID, ApiError
from kvmesh.services.gateway.metrics import EdgeMetrics
from kvmesh.services.gateway.middleware import Auth, Errors, Exchange, Trace
from kvmesh.services.gateway.requests import Plan, plan_chat, plan_completion
from kvmesh.services.gateway.schema import parse_chat, parse_completion
from kvmesh.services.gateway.streams import EventStream, Generator, merged
from kvmesh.services.gateway.vocabulary import Vocabulary
from kvmesh.v1 import common_pb2, inference_pb2


class Mesh(Generator, Protocol):
    """What the edge needs of the mesh; router.client.InferenceClient is one."""

    async def list_models(self) -> inference_pb2.ListModelsResponse: ...

    def on_behalf(self, authorization: str) -> "Mesh":
        """The same, as the caller who sent this."""
        ...


@dataclass(slots=True)
class Edge:
    """What the endpoints work with. peer: the router's address. started: Unix seconds."""

    mesh: Mesh
    vocabulary: Vocabulary
    telemetry: Telemetry
    config: GatewayConfig
    peer: str = ""
    callers: Callers = field(default_factory=Callers)
    metrics: EdgeMetrics = field(default_factory=lambda: EdgeMetrics(Meters()))
    fingerprint: str = ""
    draining: bool = False
    started: int = field(default_factory=lambda: int(time.time()))


def make_app(edge: Edge) -> Starlette:
    """Middleware is listed from the outside in; what tells tenants apart goes after Auth."""
    endpoints = Endpoints(edge)
    return Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{model:path}", endpoints.model),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
        ],
        middleware=[
            Middleware(Trace, telemetry=edge.telemetry, metrics=edge.metrics),
            Middleware(Errors, peer=edge.peer),
            Middleware(Auth, callers=edge.callers),
            Middleware(Exchange, config=edge.config),
        ],
        exception_handlers={HTTPException: _no_route},
    )


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        message, code = f"{request.method} is not allowed on this URL", "method_not_supported"
        headers = getattr(error, "headers", None)
        return ApiError(405, message, INVALID, code=code, headers=headers).response()
    message = f"Invalid URL ({request.method} {request.url.path[:200]})"
    return ApiError(status, message, INVALID, code="unknown_url").response()


class Endpoints:
    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def health(self, request: Request) -> Response:
        draining = self._edge.draining
        state = "draining" if draining else "ok"
        return JSONResponse({"status": state}, 503 if draining else 200)

    async def models(self, request: Request) -> Response:
        found = [self._model(model) for model in await self._list(request)]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        for model in await self._list(request):
            if model.name == wanted:
                return JSONResponse(self._model(model))
        raise ApiError(
            404, f"The model '{wanted[:200]}' does not exist", param="model", code="model_not_found"
        )

    async def chat(self, request: Request) -> Response:
        body = await _json_body(request)
        head = self._head(request, "chatcmpl")
        plan = plan_chat(parse_chat(body), head.id)
        answer = ChatAnswer(
            self._named(head, plan), self._edge.vocabulary, plan.logprobs, plan.include_usage
        )
        return await self._answer(request, plan, answer, "chat")

    async def completions(self, request: Request) -> Response:
        body = await _json_body(request)
        head = self._head(request, "cmpl")
        plan = plan_completion(parse_completion(body), head.id)
        decode = self._edge.vocabulary.decode
        echo = [part if isinstance(part, str) else decode(part) for part in plan.echo]
        answer = CompletionAnswer(
            self._named(head, plan), self._edge.vocabulary, plan.logprobs, plan.include_usage, echo
        )
        return await self._answer(request, plan, answer, "text_completion")

    async def _answer(
        self, request: Request, plan: Plan, answer: Answer, operation: str
    ) -> Response:
        span: trace.Span = request.scope["state"]["span"]
        span.set_attributes(
            {
                names.OPERATION: operation,
                names.PROVIDER: "kvmesh",
                names.REQUEST_MODEL: plan.model[:200],
                names.CHOICES: len(plan.generate),
            }
        )
        finished = _Finished(plan, span)
        responses = merged(self._mesh(request), plan.generate)
        if plan.stream:
            stream = EventStream(responses, answer, finished, plan.include_usage, self._edge.peer)
            await stream.begin()
            return stream
        choices = [Choice() for _ in plan.generate]
        async with aclosing(responses):
            async for index, response in responses:
                choices[index].add(response)
                if response.finish_reason:
                    finished.note(index, response)
        return Response(answer.whole(choices, finished.usage()), media_type="application/json")

    def _head(self, request: Request, prefix: str) -> Head:
        if self._edge.draining:
            raise ApiError(
                503, "this edge drains", "service_unavailable", code="service_unavailable",
                headers={"retry-after": "1"},
            )  # fmt: skip
        request_id = request.scope["state"]["request_id"]
        return Head(f"{prefix}-{request_id}", "", int(time.time()), self._edge.fingerprint)

    def _named(self, head: Head, plan: Plan) -> Head:
        return Head(head.id, plan.model, head.created, head.fingerprint)

    async def _list(self, request: Request) -> Sequence[inference_pb2.ModelInfo]:
        return (await self._mesh(request).list_models()).models

    def _mesh(self, request: Request) -> Mesh:
        """The mesh as this caller may use it."""
        sent: str | None = request.scope["state"].get("authorization")
        return self._edge.mesh if sent is None else self._edge.mesh.on_behalf(sent)

    def _model(self, model: inference_pb2.ModelInfo) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._edge.started,
            "owned_by": "kvmesh",
            "max_model_len": model.max_context,  # an extension that load tools look for
        }


class _Finished:
    """The usage of the choices that have ended, and what the span says of it."""

    def __init__(self, plan: Plan, span: trace.Span) -> None:
        self._plan = plan
        self._span = span
        self._ends: dict[int, inference_pb2.GenerateResponse] = {}

    def note(self, index: int, response: inference_pb2.GenerateResponse) -> None:
        self._ends[index] = response

    def usage(self) -> dict[str, Any]:
        ends = [self._ends[index] for index in sorted(self._ends)]
        usage = usage_of([end.usage for end in ends], self._plan.num_prompts)
        self._span.set_attributes(
            {
                names.INPUT_TOKENS: usage["prompt_tokens"],
                names.OUTPUT_TOKENS: usage["completion_tokens"],
                names.CACHED_TOKENS: usage["prompt_tokens_details"]["cached_tokens"],
                names.FINISH_REASONS: [_reason(end.finish_reason) for end in ends],
            }
        )
        return usage


def _reason(finish: common_pb2.FinishReason.ValueType) -> str:
    return common_pb2.FinishReason.Name(finish).removeprefix("FINISH_REASON_").lower()


async def _json_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page in a browser can send other types to any address without asking first.
        raise ApiError(
            415,
            "the content-type must be application/json",
            code="unsupported_content_type",
        )
    return await request.body()
