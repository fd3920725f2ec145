"""Follows what a shard holds, into the prefix index."""

import asyncio
import logging

import grpc

from kvmesh.services.common.client import Link
from kvmesh.services.router.core import RouterCore
from kvmesh.v1 import kvcache_pb2, kvcache_pb2_grpc, mesh_pb2

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0


class ShardWatch:
    """Watches one life of a shard until closed; watches anew after a gap or a break."""

    def __init__(self, member: mesh_pb2.Member, link: Link, core: RouterCore) -> None:
        self.member = member
        self._link = link
        self._stub = kvcache_pb2_grpc.KvCacheStub(link.channel)
        self._core = core
        self._task = asyncio.create_task(self._run(), name=f"watch {member.member_id}")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        member = self.member
        backoff_s = FIRST_BACKOFF_S
        while True:
            self._core.holder_joined(member.member_id, member.incarnation, shard=True)
            try:
                came = await self._follow()
            except grpc.aio.AioRpcError as error:
                logger.warning("watch of %s broke: %s", member.member_id, error.details())
                came = False
            backoff_s = FIRST_BACKOFF_S if came else min(MAX_BACKOFF_S, 2 * backoff_s)
            await asyncio.sleep(backoff_s)

    async def _follow(self) -> bool:
        """Until the stream ends or a message is missing; whether anything came."""
        call = self._stub.Watch(kvcache_pb2.WatchRequest(), metadata=self._link.metadata())
        came = False
        try:
            async for events in call:
                applied = self._core.index.apply(self.member.member_id, events)
                if applied != "ok":
                    logger.warning("%s: events are missing (%s)", self.member.member_id, applied)
                    return came
                came = True
        finally:
            call.cancel()
        return came
