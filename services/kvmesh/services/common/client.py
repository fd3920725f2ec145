"""A channel to one peer, with what every call through it carries."""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from kvmesh.services.common.security import Security
from kvmesh.services.common.telemetry import inject

# Blocks travel whole; the largest models' blocks stay below this.
MAX_MESSAGE_BYTES = 64 << 20
# Text only: a prompt of a million tokens is about 4 MB.
MAX_PUBLIC_MESSAGE_BYTES = 8 << 20

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a word is noticed within 15 s; one that crashed, at once.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name, how long an attempt to connect may take; the next one does not wait for
    # it if this one is refused.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
    # Each link has its own connection: a stream of blocks must not delay tokens.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that each leg may take; a leg that ends later ends as DEADLINE_EXCEEDED."""

    encode_s: float = 10.0
    lookup_s: float = 2.0
    get_s: float = 20.0
    put_s: float = 20.0
    tail_s: float = 5.0
    mesh_s: float = 3.0
    status_s: float = 3.0


def call_metadata(security: Security) -> tuple[tuple[str, str], ...]:
    """Metadata for one call: the bearer token and the current trace context."""
    return (*security.call_metadata(), *inject())


class Link:
    """An open channel to `address`. Close it, or use it as an async context manager."""

    def __init__(self, address: str, security: Security | None = None) -> None:
        self.address = address
        self._security = security or Security()
        credentials = self._security.channel_credentials()
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata for one call: the bearer token and the current trace context."""
        return call_metadata(self._security)

    async def close(self) -> None:
        await self.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class Links:
    """One link per address, opened on first use and kept."""

    def __init__(self, security: Security | None = None) -> None:
        self._security = security
        self._links: dict[str, Link] = {}

    def to(self, address: str) -> Link:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = Link(address, self._security)
        return link

    async def drop(self, address: str) -> None:
        """Closes the link to a peer that left. Unknown addresses are no error."""
        link = self._links.pop(address, None)
        if link is not None:
            await link.close()

    async def close(self) -> None:
        for address in list(self._links):
            await self.drop(address)
