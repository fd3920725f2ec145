"""Moves blocks and tails between this worker, the shards and other workers.

Nothing here ends a request: what does not arrive is computed again, what cannot be stored is not.
"""

import asyncio
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import context as otel_context
from opentelemetry import trace

from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout
from kvmesh.services.common import names
from kvmesh.services.common.client import Deadlines, Links
from kvmesh.services.common.errors import MeshError, NotFound
from kvmesh.services.common.telemetry import Telemetry, extract
from kvmesh.services.kvcache.client import KvCacheClient
from kvmesh.services.worker.client import WorkerClient
from kvmesh.services.worker.messages import block_format
from kvmesh.services.worker.outcome import Exported, FetchWish
from kvmesh.services.worker.sequence import Fetched, Tail, Work
from kvmesh.v1 import worker_pb2

logger = logging.getLogger(__name__)

MAX_FETCHES = 8  # at once; what they bring is in memory until it is imported
FP16_BYTES = 2
MAX_PUT_BYTES = 256 << 20  # waiting to be stored; beyond, blocks stay on this worker alone


@dataclass(slots=True)
class Moved:
    """Bytes since the process started: blocks from and to shards, tails from other workers."""

    fetched: int = 0
    put: int = 0
    tails: int = 0


class Transfer:
    """Does not own `links`. close() ends what still runs."""

    def __init__(
        self, links: Links, deadlines: Deadlines, replicas: int, layout: KvLayout,
        telemetry: Telemetry,
    ) -> None:  # fmt: skip
        self._links = links
        self._deadlines = deadlines
        self._layout = layout
        heads = layout.num_layers * layout.num_kv_heads
        self._raw_block_bytes = 2 * heads * layout.head_dim * BLOCK_SIZE * FP16_BYTES  # K and V
        self._telemetry = telemetry
        self._cache = KvCacheClient(links, deadlines, replicas)
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._put_bytes = 0
        self._puts: set[asyncio.Task[None]] = set()
        self.corrupt_tails = 0
        self.moved = Moved()

    async def fetch(self, wish: FetchWish) -> Fetched:
        """What of the wish could be had, and the unfinished block if another worker keeps it."""
        async with self._fetches:
            blocks, tail = await asyncio.gather(
                self._fetch_blocks(wish), self._fetch_tail(wish.work)
            )
        return Fetched(blocks, tail)

    def put(self, exported: Exported, on_failure: Callable[[], None]) -> asyncio.Task[None] | None:
        """Stores blocks in the background; None if there is nothing to store, or no room to.

        on_failure: called unless all shards that should have them took all.
        """
        if not exported.blocks:
            return None
        size = sum(len(block.data) for block in exported.blocks)
        if self._put_bytes + size > MAX_PUT_BYTES:
            on_failure()
            return None
        self._put_bytes += size
        task = asyncio.create_task(self._put(exported, size, on_failure))
        self._puts.add(task)
        task.add_done_callback(self._puts.discard)
        return task

    async def settle(self) -> None:
        """Waits for all that is being stored."""
        await asyncio.gather(*self._puts, return_exceptions=True)

    async def close(self) -> None:
        for task in self._puts:
            task.cancel()
        await self.settle()
        await self._cache.close()

    async def _fetch_blocks(self, wish: FetchWish) -> dict[int, bytes]:
        if not wish.keys:
            return {}
        with self._span(names.SPAN_KV_FETCH, wish.work) as span:
            result = await self._cache.fetch(wish.keys, wish.work.shards)
            span.set_attribute(names.BLOCKS, result.num_prefix)
            span.set_attribute(names.BYTES, result.num_bytes)
            span.set_attribute(names.RAW_BYTES, result.num_prefix * self._raw_block_bytes)
            span.set_attribute(names.HIT_TOKENS, result.num_prefix * BLOCK_SIZE)
            span.set_attribute(names.CORRUPT, result.corrupt)
        self.moved.fetched += result.num_bytes
        held = enumerate(result.blocks[: result.num_prefix], wish.first)
        return {index: data for index, data in held if data is not None}

    async def _fetch_tail(self, work: Work) -> Tail | None:
        if not work.tail_address or work.tail_start == len(work.token_ids) - 1:
            return None
        with self._span(names.SPAN_TAIL_FETCH, work) as span:
            client = WorkerClient(self._links.to(work.tail_address), self._deadlines)
            try:
                reply = await client.fetch_tail(work.request_id)
            except NotFound as error:
                span.set_attribute(names.REASON, str(error))
                return None
            except MeshError as error:
                logger.warning("a tail is computed again: %s", error)
                span.set_attribute(names.REASON, str(error))
                return None
            span.set_attribute(names.BYTES, len(reply.data))
            self.moved.tails += len(reply.data)
            wrong = self._what_is_wrong(reply, work)
            if wrong is None:
                return Tail(reply.start, reply.num_tokens, reply.data)
            self.corrupt_tails += 1
            logger.warning("a tail from %s is computed again: %s", work.tail_address, wrong)
            span.set_attribute(names.REASON, wrong)
            return None

    def _what_is_wrong(self, reply: worker_pb2.FetchTailResponse, work: Work) -> str | None:
        if reply.format != block_format(self._layout):
            return "it is of another model or codec"
        if reply.start != work.tail_start:
            return f"it starts at {reply.start}, not at {work.tail_start}"
        if reply.start + reply.num_tokens >= len(work.token_ids):
            return f"it has {reply.num_tokens} tokens, more than the sequence"
        if zlib.crc32(reply.data) != reply.crc32:
            return "its bytes do not match their checksum"
        return None

    async def _put(self, exported: Exported, size: int, on_failure: Callable[[], None]) -> None:
        try:
            with self._span(names.SPAN_KV_PUT, exported.work) as span:
                span.set_attribute(names.BLOCKS, len(exported.blocks))
                span.set_attribute(names.BYTES, size)
                span.set_attribute(names.RAW_BYTES, len(exported.blocks) * self._raw_block_bytes)
                result = await self._cache.put(exported.blocks, exported.work.shards)
                self.moved.put += result.num_bytes
                if result.failed_shards:
                    span.set_attribute(names.REASON, "failed: " + ", ".join(result.failed_shards))
            if result.failed_shards or result.refused:
                on_failure()
        finally:
            self._put_bytes -= size

    @contextmanager
    def _span(self, name: str, work: Work) -> Iterator[trace.Span]:
        """A child of the request's span, and the current one for the calls inside."""
        span = self._telemetry.start(name, extract(work.trace))
        token = otel_context.attach(trace.set_span_in_context(span))
        try:
            yield span
        finally:
            otel_context.detach(token)
            span.end()
