"""What every RPC passes through: errors become statuses, bad bytes become INVALID_ARGUMENT."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from kvmesh.services.common.callers import Callers
from kvmesh.services.common.errors import (
    REASON_KEY,
    RETRY_AFTER_KEY,
    InvalidRequest,
    MeshError,
)

logger = logging.getLogger(__name__)

OPEN_PREFIXES = ("/grpc.health.v1.Health/",)  # probes carry no token


class _Malformed:
    """Stands in for a request that did not parse, until the handler can answer for it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class MeshInterceptor(grpc.aio.ServerInterceptor):
    """Checks who calls, then ends an RPC that raised with a status: a MeshError's, or INTERNAL."""

    def __init__(self, callers: Callers | None = None) -> None:
        self._callers = callers or Callers()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # unknown method: gRPC answers UNIMPLEMENTED
            return None
        kind = ("unary", "stream")
        name = f"{kind[handler.request_streaming]}_{kind[handler.response_streaming]}"
        guard = _guard_stream if handler.response_streaming else _guard_unary
        make = getattr(grpc, f"{name}_rpc_method_handler")
        refusal = self._refusal(handler_call_details)
        method = guard(getattr(handler, name), refusal)
        return make(method, _tolerant(handler.request_deserializer), handler.response_serializer)

    def _refusal(self, details: Any) -> MeshError | None:
        """Why the caller may not call; raised only where it becomes a status."""
        if details.method.startswith(OPEN_PREFIXES):
            return None
        try:
            self._callers.identify(details.invocation_metadata)
        except MeshError as error:
            return error
        return None


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return parse


def _check(request: Any, refusal: MeshError | None) -> None:
    if refusal is not None:
        raise refusal
    if isinstance(request, _Malformed):
        raise InvalidRequest(f"the request is not a valid protobuf message: {request.reason}")


def _admitted(request: Any, refusal: MeshError | None) -> Any:
    """The request, or the stream of requests, of a caller that may call. Raises MeshError."""
    if hasattr(request, "__aiter__"):
        _check(None, refusal)
        return _checked(request)
    _check(request, refusal)
    return request


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        _check(request, None)
        yield request


def error_trailers(error: MeshError) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata that tells when to come back, or more of why; mostly empty."""
    if error.reason:
        return ((REASON_KEY, error.reason),)
    if error.retry_after_s <= 0:
        return ()
    milliseconds = max(1, round(error.retry_after_s * 1000))
    delay = Duration()
    delay.FromMilliseconds(milliseconds)
    detail = AnyMessage()
    detail.Pack(RetryInfo(retry_delay=delay))
    status = Status(code=error.code.value[0], message=str(error), details=[detail])
    return (
        (RETRY_AFTER_KEY, str(milliseconds)),
        ("grpc-status-details-bin", status.SerializeToString()),
    )


@asynccontextmanager
async def _status(context: Any) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:  # the servicer chose the status itself
        raise
    except MeshError as error:
        if type(error) is MeshError:
            logger.error("a bug ended an RPC", exc_info=error)
        await context.abort(error.code, str(error), error_trailers(error))
    except Exception:
        logger.exception("unexpected error in an RPC")
        await context.abort(grpc.StatusCode.INTERNAL, "internal error")


def _guard_unary(method: Any, refusal: MeshError | None) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        async with _status(context):
            request = _admitted(request, refusal)
            return await method(request, context)

    return guarded


def _guard_stream(method: Any, refusal: MeshError | None) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        async with _status(context):
            request = _admitted(request, refusal)
            async with aclosing(method(request, context)) as responses:
                async for response in responses:
                    yield response

    return guarded
