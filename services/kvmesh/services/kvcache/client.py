"""Fetches and stores sealed blocks over all shards.

A dead shard costs a recompute, never a request.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import grpc

from kvmesh.services.common.client import Deadlines, Link, Links
from kvmesh.services.common.errors import from_rpc
from kvmesh.services.kvcache.placement import place_all
from kvmesh.v1 import kvcache_pb2 as pb
from kvmesh.v1 import kvcache_pb2_grpc

T = TypeVar("T")

logger = logging.getLogger(__name__)

LEASE_S = 30.0  # longer than Lookup and Get together may take
MAX_KEYS = 65_536  # of one Lookup or Get


@dataclass(frozen=True, slots=True)
class SealedBlock:
    """A block as the shards take it. parent: empty for the first block of a sequence (index 0)."""

    key: bytes
    parent: bytes
    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What came of a list of keys.

    blocks: one per key, None where no shard gave it. The bytes were verified by the shard that
        sent them, not by this client.
    num_prefix: blocks[0:num_prefix] are all there.
    num_bytes: of all blocks that came.
    corrupt: blocks that a shard found corrupt and dropped.
    missing: blocks that a shard held at Lookup and no longer at Get.
    failed_shards: did not answer, or broke off.
    """

    blocks: list[bytes | None]
    num_prefix: int
    num_bytes: int
    corrupt: int
    missing: int
    failed_shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PutResult:
    """What came of storing; sums over all shards, so with replicas a block counts several times.

    num_bytes: sent to shards that answered. failed_shards: dead, or too full to take the blocks.
    """

    stored: int
    already_held: int
    refused: int
    num_bytes: int
    failed_shards: tuple[str, ...]


@dataclass(slots=True)
class _Fetch:
    """One fetch while it runs."""

    keys: Sequence[bytes]
    holders: list[list[str]]  # per key: shards that said that they hold it, not yet asked for it
    leases: dict[str, str] = field(default_factory=dict)
    blocks: dict[bytes, bytes] = field(default_factory=dict)
    corrupt: int = 0
    missing: int = 0
    failed: set[str] = field(default_factory=set)


class KvCacheClient:
    """Calls the shards that hold a key. Does not own `links`; close() ends its own calls."""

    def __init__(self, links: Links, deadlines: Deadlines, replicas: int = 1) -> None:
        self._links = links
        self._deadlines = deadlines
        self._replicas = replicas
        self._releases: set[asyncio.Task[None]] = set()

    async def fetch(
        self, keys: Sequence[bytes], shards: Sequence[str], lease_s: float = LEASE_S
    ) -> FetchResult:
        """The longest prefix of `keys` that the shards at these addresses hold together.

        Raises no error of a shard, only CancelledError; ValueError for more than 65,536 keys.
        """
        if len(keys) > MAX_KEYS:
            raise ValueError(f"{len(keys)} keys, at most {MAX_KEYS}")
        run = _Fetch(keys, [[] for _ in keys])
        try:
            placed = place_all(keys, shards, self._replicas)
            await self._lookup(run, placed, lease_s)
            wanted = _prefix_length(run.holders)
            while plan := _next_round(run, wanted):
                await _gather(self._get(run, shard, part) for shard, part in plan.items())
        finally:
            for shard, lease_id in run.leases.items():
                self._release(shard, lease_id)
        return _result(run)

    async def put(self, blocks: Sequence[SealedBlock], shards: Sequence[str]) -> PutResult:
        """Stores blocks on all their replicas. Raises no error of a shard, only CancelledError."""
        groups: dict[str, list[SealedBlock]] = {}
        placed = place_all([block.key for block in blocks], shards, self._replicas)
        for block, homes in zip(blocks, placed, strict=True):
            for shard in homes:
                groups.setdefault(shard, []).append(block)
        failed: set[str] = set()
        replies = await _gather(self._put(shard, group, failed) for shard, group in groups.items())
        done = [reply for reply in replies if reply is not None]
        return PutResult(
            stored=sum(reply.stored for reply in done),
            already_held=sum(reply.already_held for reply in done),
            refused=sum(reply.refused for reply in done),
            num_bytes=sum(
                len(b.data) for s, group in groups.items() if s not in failed for b in group
            ),
            failed_shards=tuple(sorted(failed)),
        )

    async def stats(self, address: str) -> pb.KvStatsResponse:
        """One shard's counters. Raises the MeshError of a call that failed."""
        link = self._links.to(address)
        try:
            reply: pb.KvStatsResponse = await _stub(link).Stats(
                pb.KvStatsRequest(), timeout=self._deadlines.status_s, metadata=link.metadata()
            )
            return reply
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, address) from error

    async def close(self) -> None:
        """Waits for the releases that are under way. Twice is safe."""
        await asyncio.gather(*self._releases)

    async def _lookup(self, run: _Fetch, placed: Sequence[Sequence[str]], lease_s: float) -> None:
        groups: dict[str, list[int]] = {}
        for position, homes in enumerate(placed):
            for shard in homes:
                groups.setdefault(shard, []).append(position)
        held: dict[str, set[int]] = {}

        async def ask(shard: str, positions: list[int]) -> None:
            link = self._links.to(shard)
            request = pb.LookupRequest(
                keys=[run.keys[position] for position in positions], lease_ms=int(lease_s * 1000)
            )
            reply = await _stub(link).Lookup(
                request, timeout=self._deadlines.lookup_s, metadata=link.metadata()
            )
            if reply.lease_id:
                run.leases[shard] = reply.lease_id
            held[shard] = {p for p, there in zip(positions, reply.held, strict=False) if there}

        await _gather(
            _tolerate(partial(ask, shard, positions), shard, run.failed)
            for shard, positions in groups.items()
        )
        nothing: set[int] = set()
        for position, homes in enumerate(placed):
            run.holders[position] = [s for s in homes if position in held.get(s, nothing)]

    async def _get(self, run: _Fetch, shard: str, keys: Sequence[bytes]) -> None:
        """Collects what comes, also if the stream then breaks."""
        # The shard releases the lease when the stream ends, however it ends.
        request = pb.GetRequest(keys=keys, lease_id=run.leases.pop(shard, ""))
        asked = frozenset(keys)

        async def collect() -> None:
            link = self._links.to(shard)
            async for reply in _stub(link).Get(
                request, timeout=self._deadlines.get_s, metadata=link.metadata()
            ):
                if reply.status == pb.BLOCK_STATUS_OK and reply.key in asked:
                    run.blocks[reply.key] = reply.data
                run.corrupt += reply.status == pb.BLOCK_STATUS_CORRUPT
                run.missing += reply.status == pb.BLOCK_STATUS_MISSING

        await _tolerate(collect, shard, run.failed)

    async def _put(
        self, shard: str, blocks: Sequence[SealedBlock], failed: set[str]
    ) -> pb.PutResponse | None:
        async def send() -> pb.PutResponse:
            link = self._links.to(shard)
            answer: pb.PutResponse = await _stub(link).Put(
                _put_requests(blocks), timeout=self._deadlines.put_s, metadata=link.metadata()
            )
            return answer

        reply = await _tolerate(send, shard, failed)
        for error in reply.errors if reply is not None else ():
            logger.warning("shard %s refused a block: %s", shard, error.message)
        return reply

    def _release(self, shard: str, lease_id: str) -> None:
        """In the background: nobody waits for it, and the lease would run out by itself."""

        async def release() -> None:
            link = self._links.to(shard)
            await _stub(link).Release(
                pb.ReleaseRequest(lease_id=lease_id),
                timeout=self._deadlines.lookup_s,
                metadata=link.metadata(),
            )

        task = asyncio.create_task(_tolerate(release, shard, set()))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


def _stub(link: Link) -> kvcache_pb2_grpc.KvCacheStub:
    return kvcache_pb2_grpc.KvCacheStub(link.channel)


async def _put_requests(blocks: Iterable[SealedBlock]) -> AsyncIterator[pb.PutRequest]:
    for block in blocks:
        yield pb.PutRequest(key=block.key, parent=block.parent, index=block.index, data=block.data)


async def _gather(calls: Iterable[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*calls))


async def _tolerate(call: Callable[[], Awaitable[T]], shard: str, failed: set[str]) -> T | None:
    """Makes `call`; None if the shard failed, which is logged and noted in `failed`."""
    try:
        return await call()
    except grpc.aio.AioRpcError as error:
        logger.warning("shard %s: %s", shard, from_rpc(error, error.code().name))
    except grpc.aio.UsageError as error:
        logger.warning("shard %s: %s", shard, error)
    except asyncio.CancelledError:
        # A channel that is closed under a call cancels the call, but not the task that made it.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        logger.warning("shard %s: the link was closed during a call", shard)
    failed.add(shard)
    return None


def _prefix_length(present: Sequence[object]) -> int:
    return next((n for n, item in enumerate(present) if not item), len(present))


def _next_round(run: _Fetch, wanted: int) -> dict[str, list[bytes]]:
    """What to ask whom next; empty when all of the prefix came or no holder is left.

    A key that its best shard did not give is asked of the next one. After the first key that no
    shard can give any more, nothing is asked.
    """
    plan: dict[str, list[bytes]] = {}
    for key, holders in zip(run.keys[:wanted], run.holders, strict=False):
        if key in run.blocks:
            continue
        while holders and holders[0] in run.failed:
            holders.pop(0)
        if not holders:
            break
        plan.setdefault(holders.pop(0), []).append(key)
    return plan


def _result(run: _Fetch) -> FetchResult:
    blocks = [run.blocks.get(key) for key in run.keys]
    return FetchResult(
        blocks=blocks,
        num_prefix=_prefix_length(blocks),
        num_bytes=sum(map(len, run.blocks.values())),
        corrupt=run.corrupt,
        missing=run.missing,
        failed_shards=tuple(sorted(run.failed)),
    )
