"""The mesh's processes as the router is connected with them: follows membership with links."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from kvmesh.services.common.client import Deadlines, Link
from kvmesh.services.common.security import Security
from kvmesh.services.router.core import RouterCore
from kvmesh.services.router.membership import Lease, Membership
from kvmesh.services.router.shard_watch import ShardWatch
from kvmesh.services.router.tokens import TokenizerPool
from kvmesh.services.router.worker_link import WorkerLink
from kvmesh.services.worker.client import WorkerClient
from kvmesh.v1 import mesh_pb2

logger = logging.getLogger(__name__)


class Fleet:
    """Members, and one link to each. `now` is the time that leases are counted in, seconds."""

    def __init__(
        self, membership: Membership, core: RouterCore, security: Security, deadlines: Deadlines
    ) -> None:
        self.membership = membership
        self.core = core
        self.tokenizers = TokenizerPool(deadlines)
        self.workers: dict[str, WorkerLink] = {}
        self._deadlines = deadlines
        self._security = security
        self._shards: dict[str, ShardWatch] = {}
        self._channels: dict[str, Link] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a request could be served now."""
        return len(self.tokenizers) > 0 and self.core.workers.can_generate()

    def shard_addresses(self) -> list[str]:
        return [watch.member.address for watch in self._shards.values()]

    def max_context(self) -> int:
        """Tokens of the longest request that some worker takes."""
        sizes = [lease.member.model.max_context for lease in self.membership.leases("worker")]
        known = self.membership.model
        return max(sizes, default=known.max_context if known is not None else 0)

    def register(self, member: mesh_pb2.Member, now: float) -> None:
        """Raises InvalidRequest or Incompatible."""
        joined = self.membership.register(member, now)
        if joined.fresh:
            if joined.replaced is not None:
                self._disconnect(joined.replaced)
            logger.info("%s joined at %s", member.member_id, member.address)
            self._connect(joined.lease)
        self.changed()

    def renew(self, request: mesh_pb2.RenewRequest, now: float) -> None:
        """Raises NotFound."""
        lease = self.membership.renew(request.member_id, request.incarnation, request.draining, now)
        state = self.core.workers.get(request.member_id)
        if state is not None and state.draining != lease.draining:
            self.core.workers.draining(request.member_id, lease.draining)
            self.changed()

    def leave(self, request: mesh_pb2.LeaveRequest) -> None:
        lease = self.membership.leave(request.member_id, request.incarnation)
        if lease is not None:
            logger.info("%s left", request.member_id)
            self._disconnect(lease)
            self.changed()

    def expire(self, now: float) -> None:
        ended = self.membership.expire(now)
        for lease in ended:
            logger.warning("the lease of %s ran out", lease.member.member_id)
            self._disconnect(lease)
        if ended:
            self.changed()

    def changed(self) -> None:
        """Wakes those that wait for a member to come, go or connect."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_changed(self) -> None:
        await self._changed.wait()

    async def close(self) -> None:
        for lease in self.membership.leases():
            self._disconnect(lease)
        await asyncio.gather(*self._closing)

    def _connect(self, lease: Lease) -> None:
        member = lease.member
        if member.kind == "gateway":  # it calls the router, never the other way round
            return
        name = member.member_id
        channel = self._channels[name] = Link(member.address, self._security)
        if member.kind == "worker":
            self._learn_format(member)
            self.core.workers.join(member)
            self.core.holder_joined(name, member.incarnation, shard=False)
            client = WorkerClient(channel, self._deadlines)
            self.workers[name] = WorkerLink(member, client, self.core, self.changed)
        elif member.kind == "kvcache":
            self._shards[name] = ShardWatch(member, channel, self.core)
        else:
            self.tokenizers.add(member, channel)

    def _disconnect(self, lease: Lease) -> None:
        if lease.member.kind == "gateway":
            return
        name = lease.member.member_id
        channel = self._channels.pop(name)
        if lease.member.kind == "tokenizer":
            gone = self.tokenizers.remove(name)
            if gone is not None:
                self._later(self._close(gone.close(), channel))
            return
        self.core.workers.leave(name)
        self.core.holder_left(name)
        link = self.workers.pop(name, None) or self._shards.pop(name)
        self._later(self._close(link.close(), channel))

    def _learn_format(self, member: mesh_pb2.Member) -> None:
        block = member.model.format
        if block.block_size:
            self.core.model.block_size = block.block_size
            self.core.model.block_bytes = block.block_bytes

    async def _close(self, work: Coroutine[Any, Any, None], channel: Link) -> None:
        await work
        await channel.close()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
