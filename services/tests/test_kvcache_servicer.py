"""One shard over real gRPC with real sealed blocks: verification, leases, watches, limits."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from cuda_shim import ShimDevice
from span_sink import SpanSink

from kvmesh.kernels.block import finish
from kvmesh.kernels.layout import KvLayout
from kvmesh.services.common import names
from kvmesh.services.common.client import Link
from kvmesh.services.common.errors import Overloaded, from_rpc
from kvmesh.services.common.security import Security
from kvmesh.services.common.server import BoundServer, Listener
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.services.kvcache.device_memory import DeviceMemory
from kvmesh.services.kvcache.feed import EventFeed
from kvmesh.services.kvcache.keys import block_keys, root_key
from kvmesh.services.kvcache.memory import BlockMemory, HeldBlock, HostMemory
from kvmesh.services.kvcache.servicer import INLINE_BYTES, Identity, KvCacheServicer
from kvmesh.services.kvcache.store import BlockStore
from kvmesh.v1 import kvcache_pb2 as pb
from kvmesh.v1 import kvcache_pb2_grpc
from kvmesh.v1.common_pb2 import BlockEvents

SMALL = KvLayout(1, 1, 32, "k4v4", b"f" * 16)
LARGE = KvLayout(4, 4, 64, "fp16", b"f" * 16)
ROOT = root_key(b"f" * 16, "k4v4", 64, "")
TIMEOUT = 20.0
MEMORIES: dict[str, Callable[[], BlockMemory]] = {
    "main memory": HostMemory,
    "device": lambda: DeviceMemory(ShimDevice(), 3 * SMALL.block_bytes),
}


@pytest.fixture(params=MEMORIES, autouse=True)
def kind_of_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on main memory, and on a device that holds three small blocks."""
    monkeypatch.setitem(MEMORIES, "chosen", MEMORIES[request.param])


def chain(count: int, first: int = 0, layout: KvLayout = SMALL) -> list[pb.PutRequest]:
    """The blocks of a sequence that begins with token `first`, with random payloads."""
    keys = block_keys(ROOT, [first, *range(1, 64 * count)])
    source = np.random.default_rng(first)
    requests = []
    for index, key in enumerate(keys):
        data = source.integers(0, 256, layout.block_bytes, dtype=np.uint8)
        finish(layout, data)
        parent = keys[index - 1] if index else b""
        requests.append(pb.PutRequest(key=key, parent=parent, index=index, data=data.tobytes()))
    return requests


def flip(request: pb.PutRequest, offset: int, mask: int = 0x01) -> pb.PutRequest:
    data = bytearray(request.data)
    data[offset] ^= mask
    return pb.PutRequest(
        key=request.key, parent=request.parent, index=request.index, data=bytes(data)
    )


@dataclass
class Shard:
    """A running shard, its inside and a stub to it."""

    stub: kvcache_pb2_grpc.KvCacheStub
    store: BlockStore[HeldBlock]
    feed: EventFeed
    servicer: KvCacheServicer
    now: float = 100.0

    async def put(self, requests: Iterable[pb.PutRequest]) -> pb.PutResponse:
        async def stream() -> AsyncIterator[pb.PutRequest]:
            for request in requests:
                yield request

        reply: pb.PutResponse = await self.stub.Put(stream(), timeout=TIMEOUT)
        return reply

    async def get(self, keys: Iterable[bytes], lease_id: str = "") -> list[pb.GetResponse]:
        request = pb.GetRequest(keys=list(keys), lease_id=lease_id)
        return [r async for r in self.stub.Get(request, timeout=TIMEOUT)]

    def watch(self) -> Any:
        return self.stub.Watch(pb.WatchRequest(), timeout=TIMEOUT)

    async def stats(self) -> pb.KvStatsResponse:
        reply: pb.KvStatsResponse = await self.stub.Stats(pb.KvStatsRequest(), timeout=TIMEOUT)
        return reply


@asynccontextmanager
async def running(
    max_bytes: int = 64 << 20,
    faults: bool = False,
    max_behind: int = 1024,
    spans: SpanSink | None = None,
) -> AsyncIterator[Shard]:
    memory = MEMORIES["chosen"]()
    store: BlockStore[HeldBlock] = BlockStore(max_bytes, "life-", memory.free)
    feed = EventFeed(7, store.keys, max_behind)
    tracing = Telemetry("kvcache", "kvcache-0", spans.senders if spans else None)
    servicer = KvCacheServicer(
        Identity("kvcache-0", 7, faults), store, feed, tracing, lambda: shard.now, memory
    )
    bound = BoundServer(Listener("127.0.0.1", 0, ("kvmesh.v1.KvCache",)), Security())
    kvcache_pb2_grpc.add_KvCacheServicer_to_server(servicer, bound.server)
    address = await bound.bind()
    async with Link(address) as link:
        shard = Shard(kvcache_pb2_grpc.KvCacheStub(link.channel), store, feed, servicer)
        try:
            yield shard
        finally:
            await bound.stop(0)
            tracing.close()
            await memory.close()
            store.check_integrity()


async def next_event(watch: Any) -> BlockEvents:
    event: BlockEvents = await watch.read()
    return event


async def status_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["inline", "in a thread"])
async def test_blocks_come_back_byte_for_byte_in_the_order_asked(layout: KvLayout) -> None:
    assert (layout.block_bytes > INLINE_BYTES) == (layout is LARGE)
    blocks = chain(4, layout=layout)
    async with running() as shard:
        first, again = await shard.put(blocks), await shard.put(blocks)
        assert (first.stored, first.already_held, again.stored, again.already_held) == (4, 0, 0, 4)
        found = await shard.get([b.key for b in reversed(blocks)] + [b"?" * 16])
        assert [(r.key, r.data) for r in found[:4]] == [(b.key, b.data) for b in reversed(blocks)]
        assert [r.status for r in found] == [pb.BLOCK_STATUS_OK] * 4 + [pb.BLOCK_STATUS_MISSING]
        stats = await shard.stats()
        assert (stats.blocks, stats.hits, stats.misses, stats.puts) == (4, 4, 1, 4)
        assert stats.bytes_used == 4 * layout.block_bytes


async def test_put_refuses_every_flipped_bit_and_stores_the_rest() -> None:
    seed = 11
    source = random.Random(seed)
    (block, good) = chain(2)
    flips = [flip(block, o, 1 << source.randrange(8)) for o in range(0, len(block.data), 7)]
    async with running() as shard:
        reply = await shard.put([*flips, good])
        assert (reply.stored, reply.refused) == (1, len(flips)), f"seed {seed}"
        codes = {error.code for error in reply.errors}
        assert codes <= {3, 9, 15} and 15 in codes
        assert all(block.key.hex() in error.message for error in reply.errors)
        assert shard.store.keys() == [good.key]
        stats = await shard.stats()
        assert stats.checksum_failures == sum(e.code == 15 for e in reply.errors)


async def test_put_refuses_a_block_that_was_cut_short() -> None:
    (block,) = chain(1)
    cut = pb.PutRequest(key=block.key, data=block.data[:-64])
    async with running() as shard:
        reply = await shard.put([cut, pb.PutRequest(key=block.key)])
        assert (reply.refused, [e.code for e in reply.errors]) == (2, [3, 3])


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["inline", "in a thread"])
async def test_a_byte_flipped_in_memory_is_found_by_get(layout: KvLayout) -> None:
    blocks = chain(3, layout=layout)
    async with running(faults=True) as shard:
        await shard.put(blocks)
        watch = shard.watch()
        assert len((await next_event(watch)).stored) == 3
        await shard.stub.Corrupt(pb.CorruptRequest(key=blocks[1].key, offset=777))
        found = await shard.get([b.key for b in blocks])
        ok, corrupt = pb.BLOCK_STATUS_OK, pb.BLOCK_STATUS_CORRUPT
        assert [r.status for r in found] == [ok, corrupt, ok]
        assert found[1].data == b""
        assert list((await next_event(watch)).removed) == [blocks[1].key]
        (gone,) = await shard.get([blocks[1].key])
        assert gone.status == pb.BLOCK_STATUS_MISSING
        stats = await shard.stats()
        assert (stats.checksum_failures, stats.blocks) == (1, 2)


async def test_fault_injection_must_be_switched_on_and_aimed() -> None:
    (block,) = chain(1)
    async with running(faults=False) as shard:
        await shard.put([block])
        error = await status_of(shard.stub.Corrupt(pb.CorruptRequest(key=block.key)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert (await shard.get([block.key]))[0].data == block.data
    async with running(faults=True) as shard:
        error = await status_of(shard.stub.Corrupt(pb.CorruptRequest(key=block.key)))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        await shard.put([block])
        request = pb.CorruptRequest(key=block.key, offset=len(block.data))
        error = await status_of(shard.stub.Corrupt(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_lease_keeps_blocks_until_its_time_has_passed() -> None:
    old, new = chain(1, 1), chain(1, 2)
    async with running(max_bytes=SMALL.block_bytes) as shard:
        await shard.put(old)
        request = pb.LookupRequest(keys=[old[0].key, new[0].key], lease_ms=5_000)
        found = await shard.stub.Lookup(request)
        assert (found.num_prefix, list(found.held)) == (1, [True, False])
        assert found.lease_id.startswith("life-")
        error = await status_of(shard.put(new))
        known = from_rpc(error, "shard")
        assert isinstance(known, Overloaded) and known.retry_after_s > 0
        assert f"of {SMALL.block_bytes} bytes are used" in str(known)
        assert (await shard.stats()).leased_blocks == 1
        shard.now += 5.0
        assert (await shard.stats()).leases == 0
        assert (await shard.put(new)).stored == 1
        assert shard.store.keys() == [new[0].key]


async def test_get_ends_its_lease_however_it_ends() -> None:
    blocks = chain(8, layout=LARGE)
    async with running() as shard:
        await shard.put(blocks)
        keys = [b.key for b in blocks]

        async def lease() -> str:
            request = pb.LookupRequest(keys=keys, lease_ms=60_000)
            return str((await shard.stub.Lookup(request)).lease_id)

        await shard.get(keys, await lease())
        assert (await shard.stats()).leases == 0

        call = shard.stub.Get(pb.GetRequest(keys=keys * 1000, lease_id=await lease()))
        await call.read()
        assert (await shard.stats()).leases == 1
        call.cancel()
        await asyncio.wait_for(shard.servicer.drain(), TIMEOUT)  # waits for the Get to end
        assert (await shard.stats()).leases == 0

        await status_of(shard.get([b"short"], lease_id := await lease()))
        assert (await shard.stats()).leases == 0, lease_id


async def test_release_ends_a_lease_and_unknown_ones_are_no_error() -> None:
    (block,) = chain(1)
    async with running() as shard:
        await shard.put([block])
        lease = (await shard.stub.Lookup(pb.LookupRequest(keys=[block.key], lease_ms=1))).lease_id
        for name in (lease, lease, "other-life-1"):
            await shard.stub.Release(pb.ReleaseRequest(lease_id=name))
        assert (await shard.stats()).leases == 0


async def test_watch_gives_a_snapshot_and_then_every_change_without_a_gap() -> None:
    first, second = chain(2, 1), chain(2, 2)
    async with running(max_bytes=3 * SMALL.block_bytes) as shard:
        await shard.put(first)
        watch = shard.watch()
        event = await next_event(watch)
        known = set(event.stored)
        assert event.snapshot and known == {b.key for b in first}
        sequence = event.sequence
        for n, block in enumerate((*second, *chain(3, 3))):
            shard.now += 1
            await shard.put([block])
            event = await next_event(watch)
            sequence += 1
            assert (event.incarnation, event.sequence, event.snapshot) == (7, sequence, False), n
            known = (known | set(event.stored)) - set(event.removed)
            assert known == set(shard.store.keys())
        assert (await shard.stats()).evictions == 4


async def test_a_slow_watcher_is_cut_off_and_watches_again() -> None:
    async with running(max_behind=3) as shard:
        watch = shard.watch()
        assert (await next_event(watch)).snapshot
        for n in range(10):  # in one turn of the loop, so the watcher has no chance to read
            shard.feed.note([bytes([n]) * 16])
            shard.feed.flush()
        error = await status_of(next_event(watch))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 messages behind" in str(error.details())
        again = await next_event(shard.watch())
        assert (again.snapshot, again.sequence) == (True, 10)


def test_changes_of_one_key_are_netted_in_one_message() -> None:
    feed = EventFeed(1, list)

    async def watch() -> None:
        feed.note(stored=[b"z"])  # is in the snapshot, so it is not told again
        events = feed.watch()
        assert (await anext(events)).snapshot
        feed.note(stored=[b"a", b"b"])
        feed.note(stored=[b"c"], removed=[b"a"])
        feed.flush()
        feed.flush()
        event = await anext(events)
        assert (set(event.stored), set(event.removed)) == ({b"b", b"c"}, {b"a"})
        assert event.sequence == 2
        await events.aclose()

    asyncio.run(watch())


async def test_drain_ends_watches() -> None:
    async with running() as shard:
        watch = shard.watch()
        await next_event(watch)
        await asyncio.wait_for(shard.servicer.drain(), TIMEOUT)
        assert (await status_of(next_event(watch))).code() is grpc.StatusCode.UNAVAILABLE
        late = shard.watch()
        assert (await status_of(next_event(late))).code() is grpc.StatusCode.UNAVAILABLE


async def test_limits_name_the_value_and_the_limit() -> None:
    (block,) = chain(1)
    async with running() as shard:
        bad_parent = pb.PutRequest(key=block.key, parent=b"p", data=block.data)
        calls = {
            "65537 keys, at most 65536": shard.stub.Lookup(
                pb.LookupRequest(keys=[b"k" * 16] * 65_537)
            ),
            "3 bytes": shard.stub.Lookup(pb.LookupRequest(keys=[b"key"])),
            "60001, at most 60000": shard.stub.Lookup(pb.LookupRequest(lease_ms=60_001)),
            "a key has 4 bytes": shard.get([b"four"]),
            "a key has 0 bytes": shard.put([pb.PutRequest(data=block.data)]),
            "parent has 1 bytes": shard.put([bad_parent]),
        }
        for text, call in calls.items():
            error = await status_of(call)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert text in str(error.details())
        assert shard.store.keys() == []


async def test_spans_hang_under_the_callers() -> None:
    sink = SpanSink()
    blocks = chain(2)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with running(spans=sink) as shard:
        call = shard.stub.Get(
            pb.GetRequest(keys=[b.key for b in blocks]), metadata=(("traceparent", parent),)
        )
        assert len([r async for r in call]) == 2
        await asyncio.wait_for(shard.servicer.drain(), TIMEOUT)
    (span,) = sink.records
    assert (span["name"], span["trace_id"]) == (names.SPAN_KV_GET, parent[3:35])
    assert span["parent_id"] == parent[36:52]
    assert span["attributes"][names.BLOCKS] == 2
