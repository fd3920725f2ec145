"""What every HTTP request passes through, from the outside in:

Trace      the server span, x-request-id, metrics; whatever happens below is in it
Errors     exceptions become error bodies
Auth       who calls: nothing below runs, and no body is read, for a caller who may not
Exchange   the body within its limits; a client that goes away ends the work
"""

import asyncio
import logging
import secrets
import traceback
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvmesh.services.common import names
from kvmesh.services.common.callers import AUTHORIZATION, Callers
from kvmesh.services.common.config import GatewayConfig
from kvmesh.services.common.errors import MeshError
from kvmesh.services.common.telemetry import Telemetry, context_of, extract, trace_id_of
from kvmesh.services.gateway.errors import ApiError, from_mesh
from kvmesh.services.gateway.metrics import EdgeMetrics

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})  # probes carry no key
ROUTES = frozenset({"/health", "/v1/models", "/v1/chat/completions", "/v1/completions"})


class Trace:
    """Continues the caller's W3C trace. The span is in scope["state"]["span"]."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, metrics: EdgeMetrics) -> None:
        self._app = app
        self._telemetry = telemetry
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"
        pairs = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        span = self._telemetry.start(
            f"{scope['method']} {route}",
            extract(pairs),
            {names.HTTP_METHOD: scope["method"], names.HTTP_ROUTE: route},
            kind=SpanKind.SERVER,
        )
        request_id = secrets.token_hex(16)
        scope.setdefault("state", {}).update(span=span, request_id=request_id)
        headers = [
            (b"x-request-id", f"req_{request_id}".encode()),
            (b"x-trace-id", trace_id_of(span).encode()),
        ]
        metrics, status, first_s = self._metrics, 0, None
        began = metrics.clock()

        async def send_traced(message: Message) -> None:
            nonlocal status, first_s
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
                status, first_s = message["status"], metrics.clock() - began
                span.set_attribute(names.HTTP_STATUS, status)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        token = otel_context.attach(context_of(span))
        metrics.active += 1
        try:
            await self._app(scope, receive, send_traced)
        finally:
            otel_context.detach(token)
            span.end()
            metrics.active -= 1
            metrics.ended(scope["method"], route, status, metrics.clock() - began, first_s)


class Errors:
    """An exception becomes an error body, unless an answer has begun; then the stream just ends."""

    def __init__(self, app: ASGIApp, peer: str) -> None:
        self._app = app
        self._peer = peer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception as error:
            if started:
                logger.error("an answer broke off: %s", type(error).__name__)
                return
            known = api_error(error, self._peer)
            note_error(scope, known)
            await known.response()(scope, receive, send)


def api_error(error: Exception, peer: str) -> ApiError:
    """What the client is told; an exception that is no answer is logged, without its values."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MeshError):
        return from_mesh(error, peer)
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("unexpected %s in a request\n%s", type(error).__name__, where)
    return from_mesh(MeshError("internal error"))


def note_error(scope: Scope, error: ApiError) -> None:
    span = scope.get("state", {}).get("span")
    if isinstance(span, trace.Span):
        span.set_attribute(names.ERROR_TYPE, error.code or error.kind)


class Auth:
    """Turns away who may not call. Who may goes on with what he sent: the router asks again.

    It is in scope["state"]["authorization"]; None if nobody has to say who he is.
    """

    def __init__(self, app: ASGIApp, callers: Callers) -> None:
        self._app = app
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._callers.open and scope["path"] not in OPEN_PATHS:
            state = scope["state"]
            sent = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
            try:
                tenant = self._callers.identify([(AUTHORIZATION, sent)])
            except MeshError as error:
                refusal = from_mesh(error)
                refusal.headers["connection"] = "close"  # the body is not read
                raise refusal from None
            if tenant is not None:
                state["span"].set_attribute(names.TENANT, tenant.name)
            state["authorization"] = sent.decode("latin-1")
        await self._app(scope, receive, send)


class Exchange:
    """Reads the whole body first; then the work below lasts as long as the client listens."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._read(scope, receive)
        if body is None:
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.get_running_loop().create_future()

        async def receive_read() -> Message:
            if pending:
                return pending.pop()
            await asyncio.shield(gone)
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self._app(scope, receive_read, send))
        watch = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            gone.cancel()
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None if the client went away first. Raises ApiError 413 or 408."""
        limit = self._config.max_body_bytes
        size = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if size.isdigit() and int(size) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        total = 0
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    total += len(chunks[-1])
                    if total > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            seconds = self._config.body_timeout_s
            raise ApiError(
                408,
                f"the body was not complete within {seconds:g} s",
                headers={"connection": "close"},
            ) from None


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> ApiError:
    close: Any = {"connection": "close"}  # what else comes of the body is not read
    return ApiError(
        413, f"the body has over {limit} bytes", code="request_too_large", headers=close
    )
