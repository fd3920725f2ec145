"""The mesh's errors and their gRPC status codes, in one place.

MeshError              INTERNAL             a bug of ours
  + InvalidRequest     INVALID_ARGUMENT     the caller must change the request
    + ContextExceeded                       the prompt is longer than the model's context
  + NotFound           NOT_FOUND            no such model, request, member or block
  + Incompatible       FAILED_PRECONDITION  another model, codec or format version
  + Unauthenticated    UNAUTHENTICATED      token or API key missing or wrong
  + Forbidden          PERMISSION_DENIED    known, and not allowed to do this
  + Overloaded         RESOURCE_EXHAUSTED   full; retry after `retry_after_s`
  + Unavailable        UNAVAILABLE          this process drains, or the one behind it is gone
  + Expired            DEADLINE_EXCEEDED    a leg took longer than its deadline
  + Corrupt            DATA_LOSS            bytes that do not match their checksum
ConfigError            (no RPC)             the process does not start; names the key or file
"""

import grpc

RETRY_AFTER_KEY = "retry-after-ms"
REASON_KEY = "error-reason"  # trailer that tells errors of one status apart


class MeshError(Exception):
    """A failure that a caller may see; the message names the value and the limit."""

    code = grpc.StatusCode.INTERNAL
    retry_after_s: float = 0.0
    reason: str = ""


class InvalidRequest(MeshError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class ContextExceeded(InvalidRequest):
    reason = "context_length_exceeded"


class NotFound(MeshError):
    code = grpc.StatusCode.NOT_FOUND


class Incompatible(MeshError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class Unauthenticated(MeshError):
    code = grpc.StatusCode.UNAUTHENTICATED


class Forbidden(MeshError):
    code = grpc.StatusCode.PERMISSION_DENIED


class Overloaded(MeshError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(MeshError):
    code = grpc.StatusCode.UNAVAILABLE


class Expired(MeshError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Corrupt(MeshError):
    code = grpc.StatusCode.DATA_LOSS


class ConfigError(Exception):
    """Configuration that stops the start; the message names the key or file and the next step."""


_BY_CODE: dict[int, type[MeshError]] = {
    kind.code.value[0]: kind
    for kind in (
        InvalidRequest,
        NotFound,
        Incompatible,
        Unauthenticated,
        Forbidden,
        Unavailable,
        Expired,
        Corrupt,
    )
}


_WRITE_FAILED = "Internal error from Core"  # grpc.aio's own, no server's


def status_number(error: MeshError) -> int:
    """The gRPC status code as a number, as kvmesh.v1.RequestError carries it."""
    number: int = error.code.value[0]
    return number


def from_status(code: int, message: str, retry_after_ms: int = 0, reason: str = "") -> MeshError:
    """The error that a status number from another process stands for."""
    if reason == ContextExceeded.reason:
        return ContextExceeded(message)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
        return Overloaded(message, retry_after_ms / 1000)
    return _BY_CODE.get(code, MeshError)(message)


def from_rpc(error: grpc.aio.AioRpcError | grpc.Call, peer: str) -> MeshError:
    """The mesh error behind a failed call to `peer`.

    A message that is written while the call ends leaves grpc.aio without the call's real status,
    so that one becomes Unavailable: it may be tried again, and then says what it is
    (https://github.com/grpc/grpc/issues/36066).
    """
    code: int = error.code().value[0]
    if code == grpc.StatusCode.INTERNAL.value[0] and error.details() == _WRITE_FAILED:
        return Unavailable(f"{peer}: the call ended while a message was written")
    retry_ms, reason = 0, ""
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_AFTER_KEY and str(value).isdigit():
            retry_ms = int(value)
        if key == REASON_KEY:
            reason = str(value)
    return from_status(code, f"{peer}: {error.details()}", retry_ms, reason)
