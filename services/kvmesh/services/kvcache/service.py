"""One kvcache shard as a process of the mesh."""

import os
import time
from collections.abc import Sequence

import grpc

from kvmesh.kernels.cuda.device import CupyDevice, unavailable_reason
from kvmesh.services.common.client import Deadlines, Link, Links
from kvmesh.services.common.config import KvCacheConfig
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.lease import MembershipLease
from kvmesh.services.common.process import ProcessContext, listen_port
from kvmesh.services.common.server import Listener
from kvmesh.services.kvcache.client import KvCacheClient
from kvmesh.services.kvcache.device_memory import DeviceMemory
from kvmesh.services.kvcache.feed import EventFeed
from kvmesh.services.kvcache.memory import BlockMemory, HeldBlock, HostMemory
from kvmesh.services.kvcache.metrics import show_shard
from kvmesh.services.kvcache.servicer import Identity, KvCacheServicer
from kvmesh.services.kvcache.store import BlockStore
from kvmesh.v1 import kvcache_pb2_grpc, mesh_pb2

FAULTS_VARIABLE = "KVMESH_FAULTS"  # 1: the Corrupt call works
SERVICE_NAME = "kvmesh.v1.KvCache"


def open_memory(config: KvCacheConfig) -> BlockMemory:
    """Raises ConfigError, with the next step, for a device that is not there."""
    if config.backend == "cpu":
        return HostMemory()
    reason = unavailable_reason()
    if reason is not None:
        raise ConfigError(f"kvcache.backend = {config.backend!r}: {reason}")
    limit = config.max_bytes if config.device_bytes is None else config.device_bytes
    return DeviceMemory(CupyDevice(), min(limit, config.max_bytes))


class KvCacheService:
    """Implements common.server.Service.

    Raises ConfigError for a bad port in the environment and for a device that is not there.
    """

    def __init__(self, context: ProcessContext) -> None:
        self._context = context
        self._port = listen_port(0)
        settings = context.config.kvcache
        self._memory = open_memory(settings)
        store: BlockStore[HeldBlock] = BlockStore(
            settings.max_bytes, f"{context.incarnation:x}-", self._memory.free
        )
        identity = Identity(
            context.member_id, context.incarnation, os.environ.get(FAULTS_VARIABLE) == "1"
        )
        feed = EventFeed(context.incarnation, store.keys)
        self._servicer = KvCacheServicer(
            identity, store, feed, context.telemetry, time.monotonic, self._memory
        )
        show_shard(context.meters, store.stats, self._memory, self._servicer.counts)
        self._lease: MembershipLease | None = None

    @property
    def listeners(self) -> Sequence[Listener]:
        return (Listener(self._context.config.host, self._port, (SERVICE_NAME,)),)

    def register(self, listeners: Sequence[grpc.aio.Server]) -> None:
        kvcache_pb2_grpc.add_KvCacheServicer_to_server(self._servicer, listeners[0])

    async def start(self, addresses: Sequence[str]) -> None:
        """Raises the MeshError of a probe that failed, or Incompatible from the router."""
        (address,) = addresses
        await self._probe(address)
        member = mesh_pb2.Member(
            member_id=self._context.member_id,
            incarnation=self._context.incarnation,
            kind="kvcache",
            address=address,
        )
        link = Link(self._context.mesh_address, self._context.security)
        self._lease = MembershipLease(link, member)
        await self._lease.start()

    async def drain(self) -> None:
        if self._lease is not None:
            await self._lease.drain()
        await self._servicer.drain()

    async def close(self) -> None:
        if self._lease is not None:
            await self._lease.close()
        await self._memory.close()

    async def _probe(self, address: str) -> None:
        """The shard answers under its own address, with the credentials that others use."""
        links = Links(self._context.security)
        try:
            await KvCacheClient(links, Deadlines()).stats(address)
        finally:
            await links.close()
