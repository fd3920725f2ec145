"""The client over several real shards: replicas, dead shards, corrupt blocks, leases."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest

from kvmesh.kernels.block import finish
from kvmesh.kernels.layout import KvLayout
from kvmesh.services.common.client import Deadlines, Links
from kvmesh.services.common.errors import Unavailable
from kvmesh.services.common.security import Security
from kvmesh.services.common.server import BoundServer, Listener
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.services.kvcache.client import KvCacheClient, SealedBlock
from kvmesh.services.kvcache.feed import EventFeed
from kvmesh.services.kvcache.keys import block_keys, root_key
from kvmesh.services.kvcache.memory import HeldBlock
from kvmesh.services.kvcache.placement import place, place_all
from kvmesh.services.kvcache.servicer import Identity, KvCacheServicer
from kvmesh.services.kvcache.store import BlockStore
from kvmesh.v1 import kvcache_pb2 as pb
from kvmesh.v1 import kvcache_pb2_grpc

LAYOUT = KvLayout(1, 1, 32, "k4v4", b"f" * 16)
TIMEOUT = 20.0


def chain(count: int) -> list[SealedBlock]:
    keys = block_keys(root_key(b"f" * 16, "k4v4", 64, ""), range(64 * count))
    source = np.random.default_rng(5)
    blocks = []
    for index, key in enumerate(keys):
        data = source.integers(0, 256, LAYOUT.block_bytes, dtype=np.uint8)
        finish(LAYOUT, data)
        parent = keys[index - 1] if index else b""
        blocks.append(SealedBlock(key, parent, index, data.tobytes()))
    return blocks


class StallingShard(kvcache_pb2_grpc.KvCacheServicer):
    """Takes a Lookup and never answers it."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.ended = asyncio.Event()

    async def Lookup(self, request, context):  # type: ignore[no-untyped-def]
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()


class BreakingShard(KvCacheServicer):
    """Gives one block of each Get, then breaks off."""

    gets = 0

    async def Get(self, request, context):  # type: ignore[no-untyped-def]
        self.gets += 1
        async for response in super().Get(request, context):
            yield response
            await context.abort(grpc.StatusCode.UNAVAILABLE, "breaks off")


@dataclass
class Mesh:
    links: Links = field(default_factory=Links)
    stores: dict[str, BlockStore[HeldBlock]] = field(default_factory=dict)
    servers: dict[str, BoundServer] = field(default_factory=dict)
    telemetry: Telemetry = field(default_factory=lambda: Telemetry("kvcache", "test"))
    clients: list[KvCacheClient] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        return list(self.servers)

    def client(self, replicas: int = 1, deadlines: Deadlines | None = None) -> KvCacheClient:
        self.clients.append(KvCacheClient(self.links, deadlines or Deadlines(), replicas))
        return self.clients[-1]

    async def add(self, servicer: kvcache_pb2_grpc.KvCacheServicer) -> str:
        bound = BoundServer(Listener("127.0.0.1", 0, ("kvmesh.v1.KvCache",)), Security())
        kvcache_pb2_grpc.add_KvCacheServicer_to_server(servicer, bound.server)
        address = await bound.bind()
        self.servers[address] = bound
        return address

    async def add_shard(
        self, max_bytes: int, kind: type[KvCacheServicer] = KvCacheServicer
    ) -> KvCacheServicer:
        store: BlockStore[HeldBlock] = BlockStore(max_bytes)
        feed = EventFeed(1, store.keys)
        identity = Identity(f"kvcache-{len(self.stores)}", 1, faults=True)
        servicer = kind(identity, store, feed, self.telemetry, lambda: 1.0)
        address = await self.add(servicer)
        self.stores[address] = store
        return servicer

    async def add_stalling(self) -> tuple[StallingShard, str]:
        stalling = StallingShard()  # type: ignore[abstract]
        return stalling, await self.add(stalling)

    async def kill(self, address: str) -> None:
        await self.servers[address].stop(0)

    async def corrupt(self, address: str, key: bytes) -> None:
        stub = kvcache_pb2_grpc.KvCacheStub(self.links.to(address).channel)
        await stub.Corrupt(pb.CorruptRequest(key=key, offset=500))

    async def assert_no_leases(self) -> None:
        for client in self.clients:
            await client.close()
        assert {a: s.stats().leases for a, s in self.stores.items() if s.stats().leases} == {}


@asynccontextmanager
async def mesh(shards: int, max_bytes: int = 1 << 20) -> AsyncIterator[Mesh]:
    running = Mesh()
    try:
        for _ in range(shards):
            await running.add_shard(max_bytes)
        yield running
    finally:
        for client in running.clients:
            await client.close()
        await running.links.close()
        for server in running.servers.values():
            await server.stop(0)
        running.telemetry.close()


def keys_of(blocks: Sequence[SealedBlock]) -> list[bytes]:
    return [block.key for block in blocks]


@pytest.mark.parametrize("replicas", [1, 2])
async def test_what_was_put_is_fetched_and_lies_where_placement_says(replicas: int) -> None:
    blocks = chain(30)
    async with mesh(3) as shards:
        client = shards.client(replicas)
        put = await client.put(blocks, shards.addresses)
        assert (put.stored, put.already_held, put.refused) == (30 * replicas, 0, 0)
        assert put.num_bytes == 30 * replicas * LAYOUT.block_bytes
        for block in blocks:
            homes = {a for a, store in shards.stores.items() if store.peek(block.key)}
            assert homes == set(place(block.key, shards.addresses, replicas))
        found = await client.fetch(keys_of(blocks), shards.addresses[::-1])
        assert found.blocks == [block.data for block in blocks]
        assert (found.num_prefix, found.num_bytes) == (30, 30 * LAYOUT.block_bytes)
        assert (found.corrupt, found.missing, found.failed_shards) == (0, 0, ())
        hits = [(await client.stats(a)).hits for a in shards.addresses]
        assert sum(hits) == 30, "each block was asked of one shard only"
        await shards.assert_no_leases()


async def test_only_the_prefix_is_fetched() -> None:
    blocks = chain(20)
    async with mesh(3) as shards:
        client = shards.client()
        await client.put([*blocks[:7], *blocks[8:]], shards.addresses)
        found = await client.fetch(keys_of(blocks), shards.addresses)
        assert found.blocks == [b.data for b in blocks[:7]] + [None] * 13
        assert found.num_prefix == 7
        assert sum(s.stats().hits for s in shards.stores.values()) == 7
        await shards.assert_no_leases()


async def test_leases_of_an_empty_prefix_are_released() -> None:
    blocks = chain(20)
    async with mesh(3) as shards:
        client = shards.client()
        await client.put(blocks[1:], shards.addresses)
        assert (await client.fetch(keys_of(blocks), shards.addresses)).num_prefix == 0
        await shards.assert_no_leases()


async def test_a_stream_that_breaks_off_is_continued_at_the_other_replica() -> None:
    blocks = chain(12)
    async with mesh(1) as shards:
        await shards.add_shard(1 << 20, BreakingShard)
        client = shards.client(replicas=2)
        await client.put(blocks, shards.addresses)
        found = await client.fetch(keys_of(blocks), shards.addresses)
        assert found.blocks == [block.data for block in blocks]
        assert found.failed_shards == (shards.addresses[1],)
        await shards.assert_no_leases()


async def test_a_shard_that_failed_is_not_asked_again() -> None:
    blocks = chain(12)
    async with mesh(0) as shards:
        both = [await shards.add_shard(1 << 20, BreakingShard) for _ in range(2)]
        client = shards.client(replicas=2)
        await client.put(blocks, shards.addresses)
        found = await client.fetch(keys_of(blocks), shards.addresses)
        assert [shard.gets for shard in both if isinstance(shard, BreakingShard)] == [1, 1]
        assert sum(block is not None for block in found.blocks) == 2, "what came is kept"
        assert found.failed_shards == tuple(sorted(shards.addresses))
        await shards.assert_no_leases()


async def test_without_replicas_a_dead_shard_ends_the_prefix(
    caplog: pytest.LogCaptureFixture,
) -> None:
    blocks = chain(30)
    async with mesh(3) as shards:
        client = shards.client()
        await client.put(blocks, shards.addresses)
        dead = place(blocks[4].key, shards.addresses)[0]
        await shards.kill(dead)
        with caplog.at_level(logging.WARNING):
            found = await client.fetch(keys_of(blocks), shards.addresses)
        homes = [placed[0] for placed in place_all(keys_of(blocks), shards.addresses)]
        assert found.num_prefix == homes.index(dead) <= 4
        assert found.blocks[: found.num_prefix] == [b.data for b in blocks[: found.num_prefix]]
        assert found.failed_shards == (dead,)
        assert dead in caplog.text
        put = await client.put(blocks, shards.addresses)
        assert put.failed_shards == (dead,)
        assert put.already_held == sum(home != dead for home in homes)
        with pytest.raises(Unavailable):
            await client.stats(dead)
        await shards.assert_no_leases()


async def test_with_replicas_a_dead_shard_costs_nothing() -> None:
    blocks = chain(30)
    async with mesh(3) as shards:
        client = shards.client(replicas=2)
        await client.put(blocks, shards.addresses)
        await shards.kill(shards.addresses[1])
        found = await client.fetch(keys_of(blocks), shards.addresses)
        assert found.num_prefix == 30
        assert found.blocks == [block.data for block in blocks]
        await shards.assert_no_leases()


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_corrupt_block_is_never_returned(replicas: int) -> None:
    blocks = chain(10)
    async with mesh(3) as shards:
        client = shards.client(replicas)
        await client.put(blocks, shards.addresses)
        bad = blocks[3]
        await shards.corrupt(place(bad.key, shards.addresses)[0], bad.key)
        found = await client.fetch(keys_of(blocks), shards.addresses)
        assert found.corrupt == 1
        expected = [b.data if replicas == 2 or b is not bad else None for b in blocks]
        assert found.blocks == expected
        assert found.num_prefix == (10 if replicas == 2 else 3)
        await shards.assert_no_leases()


async def test_a_full_shard_is_a_failed_shard() -> None:
    async with mesh(1, max_bytes=3 * LAYOUT.block_bytes) as shards:
        client = shards.client()
        put = await client.put(chain(5), shards.addresses)
        assert put.failed_shards == tuple(shards.addresses)
        found = await client.fetch(keys_of(chain(5)), shards.addresses)
        assert found.num_prefix == 3, "the beginning of the chain stays"


async def test_a_stalled_shard_costs_its_deadline_and_no_more() -> None:
    async with mesh(0) as shards:
        stalling, address = await shards.add_stalling()
        client = shards.client(deadlines=Deadlines(lookup_s=0.1))
        found = await asyncio.wait_for(client.fetch(keys_of(chain(2)), [address]), TIMEOUT)
        assert (found.num_prefix, found.failed_shards) == (0, (address,))
        await asyncio.wait_for(stalling.ended.wait(), TIMEOUT)


async def test_cancelling_a_fetch_reaches_the_shard(caplog: pytest.LogCaptureFixture) -> None:
    async with mesh(0) as shards:
        stalling, address = await shards.add_stalling()
        client = shards.client(deadlines=Deadlines(lookup_s=60.0))
        task = asyncio.create_task(client.fetch(keys_of(chain(2)), [address]))
        await asyncio.wait_for(stalling.asked.wait(), TIMEOUT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert caplog.text == "", "the shard is not to blame"
        await asyncio.wait_for(stalling.ended.wait(), TIMEOUT)


async def test_a_fetch_cancelled_before_its_first_call_leaves_nothing() -> None:
    """A warning that a coroutine was never awaited would fail this test."""
    async with mesh(1) as shards:
        client = shards.client()

        async def cancelled() -> None:
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)
            await client.fetch(keys_of(chain(2)), shards.addresses)

        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(cancelled())
        gc.collect()


async def test_a_link_that_is_dropped_under_a_call_is_a_failed_shard() -> None:
    async with mesh(0) as shards:
        stalling, address = await shards.add_stalling()
        client = shards.client(deadlines=Deadlines(lookup_s=60.0))
        task = asyncio.create_task(client.fetch(keys_of(chain(2)), [address]))
        await asyncio.wait_for(stalling.asked.wait(), TIMEOUT)
        await shards.links.drop(address)
        found = await asyncio.wait_for(task, TIMEOUT)
        assert found.failed_shards == (address,)


async def test_without_shards_nothing_is_held_and_nothing_fails() -> None:
    async with mesh(0) as shards:
        client = shards.client()
        found = await client.fetch(keys_of(chain(2)), [])
        assert (found.blocks, found.failed_shards) == ([None, None], ())
        assert (await client.put(chain(2), [])).stored == 0
        assert (await client.fetch([], ["127.0.0.1:1"])).num_prefix == 0


async def test_too_many_keys_are_refused_before_any_call() -> None:
    async with mesh(1) as shards:
        with pytest.raises(ValueError, match="65537 keys"):
            await shards.client().fetch([b"k" * 16] * 65_537, shards.addresses)


async def test_a_stranger_at_the_address_is_a_failed_shard() -> None:
    """An address that another kind of service has taken over answers UNIMPLEMENTED."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with mesh(0) as shards:
            found = await shards.client().fetch(keys_of(chain(1)), [f"127.0.0.1:{port}"])
            assert found.failed_shards == (f"127.0.0.1:{port}",)
    finally:
        await server.stop(0)
