"""The edge's errors as OpenAI's API writes them: {"error": {message, type, param, code}}.

mesh error          status  type                    code
InvalidRequest      400     invalid_request_error   (context_length_exceeded if that is why)
Unauthenticated     401     invalid_request_error   invalid_api_key
Forbidden           403     invalid_request_error   permission_denied
NotFound            404     invalid_request_error   model_not_found
Overloaded          429     rate_limit_error        rate_limit_exceeded, with Retry-After
Unavailable         503     service_unavailable     service_unavailable
Expired             504     server_error            timeout
any other           500     server_error            internal_error
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import Response

from kvmesh.services.common.errors import (
    ContextExceeded,
    Expired,
    Forbidden,
    InvalidRequest,
    MeshError,
    NotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
)

INVALID = "invalid_request_error"


class ApiError(Exception):
    """What an HTTP client is answered. param: the field that is wrong. headers: beside the body."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


@dataclass(frozen=True, slots=True)
class _Shape:
    status: int
    kind: str
    code: str | None


_SHAPES: tuple[tuple[type[MeshError], _Shape], ...] = (
    (ContextExceeded, _Shape(400, INVALID, "context_length_exceeded")),
    (InvalidRequest, _Shape(400, INVALID, None)),
    (Unauthenticated, _Shape(401, INVALID, "invalid_api_key")),
    (Forbidden, _Shape(403, INVALID, "permission_denied")),
    (NotFound, _Shape(404, INVALID, "model_not_found")),
    (Overloaded, _Shape(429, "rate_limit_error", "rate_limit_exceeded")),
    (Unavailable, _Shape(503, "service_unavailable", "service_unavailable")),
    (Expired, _Shape(504, "server_error", "timeout")),
)
_NAMED = frozenset(
    ("temperature", "top_p", "min_p", "max_tokens", "min_tokens", "repetition_penalty",
     "presence_penalty", "frequency_penalty", "top_logprobs", "logit_bias", "cache_salt")
)  # fmt: skip
_BUG = _Shape(500, "server_error", "internal_error")


def from_mesh(error: MeshError, peer: str = "") -> ApiError:
    """What a client is told of a mesh's error. peer: the router's address, which it is not told."""
    shape = next((shape for kind, shape in _SHAPES if isinstance(error, kind)), _BUG)
    message = str(error).removeprefix(f"{peer}: ") if shape is not _BUG else "internal error"
    headers = retry_headers(error.retry_after_s) if shape.status in (429, 503) else {}
    return ApiError(
        shape.status,
        message,
        shape.kind,
        param=_param(shape, message),
        code=shape.code,
        headers=headers,
    )


def _param(shape: _Shape, message: str) -> str | None:
    """The field that is wrong: the router's messages begin with its name."""
    if shape.code == "model_not_found":
        return "model"
    first = message.partition(" ")[0].partition(".")[0]
    if shape.kind != INVALID:
        return None
    return "response_format" if first == "constraint" else first if first in _NAMED else None


def retry_headers(seconds: float) -> dict[str, str]:
    """Retry-After takes whole seconds; retry-after-ms, which OpenAI's clients prefer, is exact."""
    if seconds <= 0:
        return {}
    return {
        "retry-after": str(math.ceil(seconds)),
        "retry-after-ms": str(max(1, round(seconds * 1000))),
    }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """A field of OpenAI's API that would change the answer, and that this mesh cannot honour."""
    return invalid(f"'{param}' is not supported: {why}", param, "unsupported_parameter")
