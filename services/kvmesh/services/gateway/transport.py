"""The HTTP server: uvicorn on httptools, with limits on heads that uvicorn does not have.

A head (request line and headers) must be complete within `head_timeout_s` and `max_head_bytes`,
however slowly it comes; a client that takes none of its answer for `write_timeout_s` is let go; a
connection over `max_connections` is answered 503 at once. Bodies have their limits in
middleware.Exchange.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from kvmesh.services.common.config import GatewayConfig
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.security import Security, check_binding
from kvmesh.services.gateway.errors import ApiError, invalid

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8080
START_S = 10.0
KEEP_ALIVE_S = 60  # for the next request of a connection


@dataclass(slots=True)
class Connections:
    """Of one listener, now."""

    open: int = 0


class _TooLarge(Exception):
    """Ends parsing from within a callback of the parser."""


class EdgeProtocol(HttpToolsProtocol):
    """One connection. gateway: its limits; these two are set on a subclass for each listener."""

    gateway = GatewayConfig()
    count = Connections()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.count.open = len(self.connections)
        self._in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refusal: ApiError | None = None
        if len(self.connections) > self.gateway.max_connections:
            busy = ApiError(
                503,
                f"{self.gateway.max_connections} connections are open already",
                "service_unavailable",
                code="service_unavailable",
                headers={"retry-after": "1"},
            )
            self._refuse(busy)
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._stop_write_timer()
        super().connection_lost(exc)
        self.count.open = len(self.connections)

    def pause_writing(self) -> None:
        """What the client has not taken yet is over the transport's limit."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.gateway.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head and self._head_timer is None:
            self._arm()
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.gateway.max_head_bytes and not self.transport.is_closing():
                self._refuse(self._too_large())

    def on_headers_complete(self) -> None:
        self._disarm()
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.gateway.max_head_bytes:
            self._refusal = self._too_large()
            raise _TooLarge
        httptools.parse_url(self.url).path.decode("ascii")  # refused here, not in an unseen task
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or invalid("the request is not valid HTTP/1.1"))

    def _too_large(self) -> ApiError:
        limit = self.gateway.max_head_bytes
        return ApiError(431, f"the request line and headers have over {limit} bytes")

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(self.gateway.head_timeout_s, self._late)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # the answer that is under way ends first
            return
        limit = self.gateway.head_timeout_s
        self._refuse(ApiError(408, f"the headers were not complete within {limit:g} s"))

    def _refuse(self, error: ApiError) -> None:
        """Answers and closes; bytes that come after are not read."""
        self._disarm()
        self._unset_keepalive_if_required()
        if self.cycle is None or self.cycle.response_complete:
            body = error.body()
            lines = [STATUS_LINE[error.status], b"content-type: application/json\r\n"]
            lines += [f"{k}: {v}\r\n".encode() for k, v in error.headers.items()]
            lines += [b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body), body]
            self.transport.write(b"".join(lines))
        self.transport.close()


class _Server(uvicorn.Server):
    """Signals are the process's own business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True)
class HttpListener:
    """Where the edge listens. certificate: PEM files of certificate and key, for TLS.

    port: None for 8080, or any free one if that is taken.
    """

    host: str
    port: int | None
    app: Any
    config: GatewayConfig
    certificate: tuple[str, str] | None = None
    connections: Connections = field(default_factory=Connections)

    def open(self, security: Security) -> "HttpServer":
        check_binding(self.host, security)
        return HttpServer(self)


class HttpServer:
    """A bound listener; the verbs of common.server.Bound."""

    def __init__(self, listener: HttpListener) -> None:
        self._listener = listener
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._sweep: asyncio.Task[None] | None = None

    async def bind(self) -> str:
        """Starts listening; the URL. Raises ConfigError if the port is taken."""
        listener = self._listener
        sock = _bind(listener.host, listener.port)
        cert, key = listener.certificate or (None, None)
        protocol = type(
            "Protocol", (EdgeProtocol,), {"gateway": listener.config, "count": listener.connections}
        )
        self._server = _Server(
            uvicorn.Config(
                listener.app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
                ssl_certfile=cert,
                ssl_keyfile=key,
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # else: a line per bad request
        self._task = asyncio.create_task(self._server.serve([sock]), name="http")
        self._sweep = asyncio.create_task(self._abort_closing(), name="http sweep")
        async with asyncio.timeout(START_S):
            while not self._server.started:
                if self._task.done():
                    self._task.result()
                await asyncio.sleep(0.005)
        scheme = "https" if cert else "http"
        host = f"[{listener.host}]" if ":" in listener.host else listener.host
        return f"{scheme}://{host}:{sock.getsockname()[1]}"

    async def set_serving(self, serving: bool) -> None:
        """The app itself says whether it serves."""

    async def stop(self, grace_s: float) -> None:
        """Takes no new connections; those that are open end within about a second."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await asyncio.wait({self._task}, timeout=grace_s + 2.0)
            tasks = [task for task in (self._task, self._sweep) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _abort_closing(self) -> None:
        """A connection closes when its last bytes are taken; one that takes them not is let go."""
        before: set[Any] = set()
        while self._server is not None:
            await asyncio.sleep(self._listener.config.write_timeout_s)
            closing = {c for c in self._server.server_state.connections if c.transport.is_closing()}
            for connection in closing & before:
                connection.transport.abort()
            before = closing


def _bind(host: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wanted = DEFAULT_PORT if port is None else port
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        try:
            sock.bind((host, wanted))
            sock.listen()
        except OSError as error:
            if port is not None or error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            logger.warning("port %d is taken, so the HTTP edge takes a free one", wanted)
            sock.close()
            return _bind(host, 0)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {host}:{wanted} for HTTP: {error.strerror}; "
            "set gateway.port to another port, or to 0 for any free one"
        ) from error
    sock.setblocking(False)
    return sock
