"""The KvCache service over one BlockStore. Verifies blocks on the way in and on the way out."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import Span

from kvmesh.kernels.block import BlockHeader, verify
from kvmesh.kernels.errors import (
    BlockError,
    ChecksumMismatch,
    WrongFingerprint,
    WrongLayout,
    WrongVersion,
)
from kvmesh.services.common import names
from kvmesh.services.common.errors import (
    Corrupt,
    Incompatible,
    InvalidRequest,
    MeshError,
    NotFound,
    status_number,
)
from kvmesh.services.common.telemetry import Telemetry, extract
from kvmesh.services.kvcache.feed import EventFeed
from kvmesh.services.kvcache.keys import KEY_BYTES
from kvmesh.services.kvcache.memory import BlockMemory, HeldBlock, HostMemory
from kvmesh.services.kvcache.store import BlockStore
from kvmesh.v1 import common_pb2, kvcache_pb2_grpc
from kvmesh.v1 import kvcache_pb2 as pb

logger = logging.getLogger(__name__)

MAX_KEYS = 65_536  # of one Lookup or Get, and blocks of one Put
MAX_LEASE_MS = 60_000
# A checksum of this many bytes takes about as long as a hop to a thread.
INLINE_BYTES = 64 << 10
READ_AHEAD = 8  # blocks that a Get asks the memory for at once


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this shard is. faults: whether Corrupt is allowed."""

    member_id: str
    incarnation: int
    faults: bool = False


@dataclass(slots=True)
class ShardCounts:
    """Since the process started; bytes are those of blocks."""

    checksum_failures: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class KvCacheServicer(kvcache_pb2_grpc.KvCacheServicer):
    """Translates between the wire and the store.

    clock: seconds, never backwards; decides when leases end and which block is older. memory: where
    the blocks of `store` lie, and what its `free` tells; none: main memory.
    """

    def __init__(
        self,
        identity: Identity,
        store: BlockStore[HeldBlock],
        feed: EventFeed,
        telemetry: Telemetry,
        clock: Callable[[], float],
        memory: BlockMemory | None = None,
    ) -> None:
        self._identity = identity
        self._store = store
        self._feed = feed
        self._telemetry = telemetry
        self._clock = clock
        self._memory = memory or HostMemory()
        self.counts = ShardCounts()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def Lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupResponse:
        _check_keys(request.keys)
        if request.lease_ms > MAX_LEASE_MS:
            raise InvalidRequest(f"lease_ms is {request.lease_ms}, at most {MAX_LEASE_MS}")
        found = self._store.lookup(request.keys, self._clock(), request.lease_ms / 1000)
        return pb.LookupResponse(
            num_prefix=found.num_prefix, held=found.held, lease_id=found.lease_id
        )

    async def Put(
        self, request_iterator: AsyncIterator[pb.PutRequest], context: Any
    ) -> pb.PutResponse:
        reply = pb.PutResponse()
        now = self._clock()  # blocks of one call are equally old
        total = count = 0
        with self._working(names.SPAN_KV_STORE, context) as span:
            try:
                async for request in request_iterator:
                    count += 1
                    total += len(request.data)
                    if count > MAX_KEYS:
                        raise InvalidRequest(f"more than {MAX_KEYS} blocks in one Put")
                    await self._put_one(request, now, reply)
            finally:
                self._feed.flush()
                self.counts.bytes_in += total
                span.set_attributes(
                    {names.BLOCKS: count, names.BYTES: total, names.CORRUPT: reply.refused}
                )
        return reply

    async def Get(self, request: pb.GetRequest, context: Any) -> AsyncIterator[pb.GetResponse]:
        sent = corrupt = 0
        now = self._clock()
        with self._working(names.SPAN_KV_GET, context) as span:
            try:
                _check_keys(request.keys)
                for at in range(0, len(request.keys), READ_AHEAD):
                    for response in await self._get(request.keys[at : at + READ_AHEAD], now):
                        sent += len(response.data)
                        corrupt += response.status == pb.BLOCK_STATUS_CORRUPT
                        yield response
            finally:
                self._store.release(request.lease_id)
                self._feed.flush()
                self.counts.bytes_out += sent
                span.set_attributes(
                    {
                        names.BLOCKS: len(request.keys),
                        names.BYTES: sent,
                        names.CORRUPT: corrupt,
                    }
                )

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        self._store.release(request.lease_id)
        return pb.ReleaseResponse()

    async def Stats(self, request: pb.KvStatsRequest, context: Any) -> pb.KvStatsResponse:
        self._store.expire(self._clock())
        stats = self._store.stats()
        return pb.KvStatsResponse(
            member_id=self._identity.member_id,
            incarnation=self._identity.incarnation,
            blocks=stats.blocks,
            bytes_used=stats.bytes_used,
            bytes_budget=stats.bytes_budget,
            hits=stats.hits,
            misses=stats.misses,
            puts=stats.puts,
            evictions=stats.evictions,
            checksum_failures=self.counts.checksum_failures,
            leases=stats.leases,
            leased_blocks=stats.leased_blocks,
        )

    async def Watch(
        self, request: pb.WatchRequest, context: Any
    ) -> AsyncIterator[common_pb2.BlockEvents]:
        async with aclosing(self._feed.watch()) as events:
            async for event in events:
                yield event

    async def Corrupt(self, request: pb.CorruptRequest, context: Any) -> pb.CorruptResponse:
        if not self._identity.faults:
            raise Incompatible("fault injection is off; start this process with KVMESH_FAULTS=1")
        block = self._store.peek(request.key)
        data = None if block is None else (await self._memory.read([block]))[0]
        if data is None:
            raise NotFound(f"no block {request.key.hex()} is held")
        if request.offset >= len(data):
            raise InvalidRequest(f"offset is {request.offset}, the block has {len(data)} bytes")
        flipped = bytearray(data)
        flipped[request.offset] ^= 0xFF
        self._store.overwrite(request.key, self._memory.hold(bytes(flipped)))
        return pb.CorruptResponse()

    async def drain(self) -> None:
        """Ends the watches; returns when no Put or Get runs."""
        self._feed.close()
        await self._idle.wait()

    async def _put_one(self, request: pb.PutRequest, now: float, reply: pb.PutResponse) -> None:
        _check_block_keys(request)
        try:
            header = await _verify(request.data)
        except BlockError as error:
            self.counts.checksum_failures += isinstance(error, ChecksumMismatch)
            reply.refused += 1
            reason = _mesh_error(request.key, error)
            reply.errors.add(code=status_number(reason), message=str(reason))
            logger.warning("refused: %s", reason)
            return
        block = self._memory.hold(request.data)
        outcome = self._store.put(request.key, request.parent, request.index, block, now)
        if outcome.stored:
            reply.stored += 1
            self._feed.note([request.key], outcome.evicted)
            await self._memory.settle(block, header.layout)
        else:
            reply.already_held += 1

    async def _get(self, keys: Sequence[bytes], now: float) -> list[pb.GetResponse]:
        held = [(key, self._store.get(key, now)) for key in keys]
        read = iter(await self._memory.read([block for _, block in held if block is not None]))
        return [
            pb.GetResponse(key=key, status=pb.BLOCK_STATUS_MISSING)
            if block is None
            else await self._verified(key, block, next(read))
            for key, block in held
        ]

    async def _verified(self, key: bytes, block: HeldBlock, data: bytes | None) -> pb.GetResponse:
        """data: what was read of it, None if nothing could be. A bad block is dropped."""
        try:
            if data is None:
                raise BlockError("the device lost it")
            await _verify(data)
        except BlockError as error:
            self.counts.checksum_failures += 1
            logger.error("dropped: %s", _mesh_error(key, error))
            # While the checksum ran elsewhere, another call may have replaced the block.
            if self._store.peek(key) is block:
                self._store.remove(key)
                self._feed.note(removed=[key])
            return pb.GetResponse(key=key, status=pb.BLOCK_STATUS_CORRUPT)
        return pb.GetResponse(key=key, status=pb.BLOCK_STATUS_OK, data=data)

    @contextmanager
    def _working(self, span_name: str, context: Any) -> Iterator[Span]:
        """Counts a call that drain waits for, and gives it a span under the caller's."""
        self._running += 1
        self._idle.clear()
        span = self._telemetry.start(span_name, extract(context.invocation_metadata()))
        try:
            yield span
        finally:
            span.end()
            self._running -= 1
            if not self._running:
                self._idle.set()


async def _verify(data: bytes) -> BlockHeader:
    """Raises BlockError. The checksum of a large block runs in a thread, without the GIL."""
    if len(data) <= INLINE_BYTES:
        return verify(data)
    return await asyncio.to_thread(verify, data)


def _check_keys(keys: Sequence[bytes]) -> None:
    if len(keys) > MAX_KEYS:
        raise InvalidRequest(f"{len(keys)} keys, at most {MAX_KEYS}")
    for key in keys:
        if len(key) != KEY_BYTES:
            raise InvalidRequest(f"a key has {len(key)} bytes, must have {KEY_BYTES}")


def _check_block_keys(request: pb.PutRequest) -> None:
    _check_keys([request.key])
    if request.parent and len(request.parent) != KEY_BYTES:
        raise InvalidRequest(
            f"parent has {len(request.parent)} bytes, must have {KEY_BYTES} or none"
        )


def _mesh_error(key: bytes, error: BlockError) -> MeshError:
    kind: type[MeshError] = InvalidRequest
    if isinstance(error, ChecksumMismatch):
        kind = Corrupt
    elif isinstance(error, WrongVersion | WrongFingerprint | WrongLayout):
        kind = Incompatible
    return kind(f"block {key.hex()}: {error}")
