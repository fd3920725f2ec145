"""The life of a service process: bind, start, serve, drain, stop.

The health service (grpc.health.v1) says NOT_SERVING until the service's own probe has passed, and
again while it drains.
"""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from kvmesh.services.common.callers import Callers
from kvmesh.services.common.client import MAX_MESSAGE_BYTES
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.interceptors import MeshInterceptor
from kvmesh.services.common.security import Security, check_binding

logger = logging.getLogger(__name__)

METADATA_BYTES = 16 << 10  # of one call; more is refused before the call is known
HANDSHAKE_MS = 10_000  # until a connection speaks TLS and HTTP/2; then it is closed
DRAIN_S = 10.0  # requests that run at SIGTERM may take this long to end
GRACE_S = 1.0  # then RPCs that are still open are cancelled after this


class Bound(Protocol):
    """A server on one address."""

    async def bind(self) -> str:
        """Starts listening; the address with its real port. Raises ConfigError if it is taken."""
        ...

    async def set_serving(self, serving: bool) -> None: ...

    async def stop(self, grace_s: float) -> None: ...


class Openable(Protocol):
    """Where a server is to listen: a Listener for gRPC, or one of another protocol."""

    def open(self, security: Security) -> Bound: ...


class Service(Protocol):
    """What a process serves. Each verb is called once, in this order; close always.

    Each service package has one such class in `service.py`, made from a ProcessContext.
    """

    @property
    def listeners(self) -> Sequence[Openable]: ...

    def register(self, listeners: Sequence[grpc.aio.Server]) -> None:
        """Adds the servicers to the gRPC listeners, one's worth each, before anything is bound."""
        ...

    async def start(self, addresses: Sequence[str]) -> None:
        """The listeners are bound to these addresses. When it returns, the probe has passed."""
        ...

    async def drain(self) -> None:
        """Takes no new work; returns when the running work has ended."""
        ...

    async def close(self) -> None:
        """Releases everything, also after a failed start."""
        ...


@dataclass(frozen=True, slots=True)
class Listener:
    """One address of a process.

    names: full gRPC service names, for health and reflection.
    mutual: callers must show a certificate (with TLS); false for the public address.
    or_any: if the port is taken, any free one will do.
    callers: who may call; None: who has the mesh's token, if it has one.
    """

    host: str
    port: int
    names: tuple[str, ...]
    mutual: bool = True
    max_message_bytes: int = MAX_MESSAGE_BYTES
    or_any: bool = False
    callers: Callers | None = None

    def open(self, security: Security) -> "BoundServer":
        return BoundServer(self, security)


class BoundServer:
    """A grpc.aio server on one listener, with health, reflection and the interceptor."""

    def __init__(self, listener: Listener, security: Security) -> None:
        check_binding(listener.host, security)
        self._listener = listener
        self._security = security
        callers = listener.callers or Callers(security.token)
        self.server = grpc.aio.server(
            interceptors=[MeshInterceptor(callers)],
            options=(
                ("grpc.max_receive_message_length", listener.max_message_bytes),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_metadata_size", METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", METADATA_BYTES),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
                ("grpc.so_reuseport", 0),  # a port in use is an error, not a shared port
                # Keep-alive pings of idle streams are welcome.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.http2.max_ping_strikes", 0),
            ),
        )
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection(
            (*listener.names, HEALTH_NAME, reflection.SERVICE_NAME), self.server
        )

    async def bind(self) -> str:
        """Starts listening; the address with its real port. Raises ConfigError if it is taken."""
        port = self._bind()
        await self.set_serving(False)
        await self.server.start()
        return f"{self._listener.host}:{port}"

    def _bind(self) -> int:
        host, port = self._listener.host, self._listener.port
        try:
            return self._add_port(f"{host}:{port}")
        except RuntimeError as error:
            if self._listener.or_any:
                logger.warning("port %d is taken, so %s takes a free one", port, self._names)
                return self._add_port(f"{host}:0")
            raise ConfigError(
                f"cannot listen on {host}:{port}: the port is in use or not allowed; "
                "set another port, or 0 for any free one"
            ) from error

    def _add_port(self, address: str) -> int:
        credentials = self._security.server_credentials(self._listener.mutual)
        if credentials is None:
            return self.server.add_insecure_port(address)
        return self.server.add_secure_port(address, credentials)

    @property
    def _names(self) -> str:
        return ", ".join(self._listener.names)

    async def set_serving(self, serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if serving else states.NOT_SERVING
        for name in ("", *self._listener.names):
            await self._health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        await self.server.stop(grace_s)


async def serve(
    service: Service,
    security: Security,
    on_ready: Callable[[Sequence[str]], None],
    stop: asyncio.Event | None = None,
    on_bound: Callable[[Sequence[str]], None] | None = None,
) -> None:
    """Runs `service` until SIGTERM, SIGINT or `stop`; then drains. Raises what its start raised.

    on_ready gets the bound addresses once the service has started and health says SERVING;
    on_bound gets them as soon as they are known, for those that the service waits for.
    """
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    servers = [listener.open(security) for listener in service.listeners]
    service.register([bound.server for bound in servers if isinstance(bound, BoundServer)])
    try:
        addresses = [await bound.bind() for bound in servers]
        if on_bound is not None:
            on_bound(addresses)
        if await _unless_stopped(service.start(addresses), stop):
            await _each(servers, lambda bound: bound.set_serving(True))
            on_ready(addresses)
            await stop.wait()
            logger.info("draining")
            await _each(servers, lambda bound: bound.set_serving(False))
            await _bounded(service.drain(), DRAIN_S)
    finally:
        await _each(servers, lambda bound: bound.stop(GRACE_S))
        await service.close()


async def _each(servers: Sequence[Bound], act: Callable[[Bound], Awaitable[None]]) -> None:
    for bound in servers:
        await act(bound)


async def _unless_stopped(work: Awaitable[None], stop: asyncio.Event) -> bool:
    """Awaits `work`; False if `stop` came first and the work was cancelled."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False


async def _bounded(work: Awaitable[None], seconds: float) -> None:
    try:
        await asyncio.wait_for(work, seconds)
    except TimeoutError:
        logger.warning("drain took longer than %.0f s; what still runs is cancelled", seconds)
