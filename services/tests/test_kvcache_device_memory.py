"""A shard's blocks in device memory: the same bytes, overflow, slots reused, a failing device."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from cuda_shim import ShimDevice

from kvmesh.kernels.block import finish
from kvmesh.kernels.cuda.device import CupyDevice, unavailable_reason
from kvmesh.kernels.cuda.slots import BlockSlots
from kvmesh.kernels.errors import ChecksumMismatch
from kvmesh.kernels.layout import KvLayout
from kvmesh.services.kvcache.device_memory import DeviceMemory
from kvmesh.services.kvcache.memory import HeldBlock

LAYOUT = KvLayout(1, 1, 32, "k4v4", b"f" * 16)
OTHER = KvLayout(2, 1, 32, "k4v4", b"f" * 16)


def a_block(seed: int, layout: KvLayout = LAYOUT) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, layout.block_bytes, dtype=np.uint8)
    finish(layout, data)
    return data.tobytes()


@asynccontextmanager
async def a_memory(slots: int, device: Any = None) -> AsyncIterator[DeviceMemory]:
    memory = DeviceMemory(device or ShimDevice(), slots * LAYOUT.block_bytes)
    try:
        yield memory
    finally:
        await memory.close()


async def settled(memory: DeviceMemory, data: bytes, layout: KvLayout = LAYOUT) -> HeldBlock:
    block = memory.hold(data)
    await memory.settle(block, layout)
    return block


def on_device(blocks: Sequence[HeldBlock]) -> list[bool]:
    return [block.slot is not None for block in blocks]


async def test_the_least_recently_used_goes_to_main_memory() -> None:
    data = [a_block(seed) for seed in range(5)]
    async with a_memory(3) as memory:
        blocks = [await settled(memory, each) for each in data[:3]]
        assert on_device(blocks) == [True] * 3 and all(block.data is None for block in blocks)
        assert memory.device_bytes == 3 * LAYOUT.block_bytes
        assert await memory.read([blocks[0]]) == data[:1]
        blocks += [await settled(memory, each) for each in data[3:]]
        assert on_device(blocks) == [True, False, False, True, True]
        assert await memory.read(blocks[::-1]) == data[::-1]
        assert await memory.read([blocks[4], blocks[1], blocks[4]]) == [data[4], data[1], data[4]]
        assert memory.device_bytes == 3 * LAYOUT.block_bytes


async def test_a_freed_slot_is_used_again_and_main_memory_is_not() -> None:
    async with a_memory(2) as memory:
        first, second = [await settled(memory, a_block(seed)) for seed in range(2)]
        memory.free(first)
        third = await settled(memory, a_block(2))
        assert on_device([second, third]) == [True, True]
        assert await memory.read([second, third]) == [a_block(1), a_block(2)]


async def test_a_read_that_began_before_its_block_was_freed_gets_its_bytes() -> None:
    async with a_memory(1) as memory:
        old = await settled(memory, a_block(0))
        reading = asyncio.ensure_future(memory.read([old]))
        await asyncio.sleep(0)  # the read has asked the device
        memory.free(old)
        new = await settled(memory, a_block(1))
        assert await reading == [a_block(0)]
        assert on_device([new]) == [True] and await memory.read([new]) == [a_block(1)]


async def test_blocks_of_another_layout_stay_in_main_memory() -> None:
    async with a_memory(2) as memory:
        await settled(memory, a_block(0))
        other = await settled(memory, a_block(1, OTHER), OTHER)
        assert on_device([other]) == [False]
        assert await memory.read([other]) == [a_block(1, OTHER)]


async def test_a_device_too_small_for_a_block_holds_none() -> None:
    memory = DeviceMemory(ShimDevice(), LAYOUT.block_bytes - 1)
    block = await settled(memory, a_block(0))
    assert on_device([block]) == [False] and await memory.read([block]) == [a_block(0)]
    await memory.close()


async def test_a_call_that_ends_early_leaves_the_slots_right() -> None:
    async with a_memory(1) as memory:
        old = await settled(memory, a_block(0))
        new = memory.hold(a_block(1))
        task = asyncio.ensure_future(memory.settle(new, LAYOUT))
        await asyncio.sleep(0)  # the victim has been chosen
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await memory.read([old, new]) == [a_block(0), a_block(1)]
        last = await settled(memory, a_block(2))
        assert on_device([last]) == [True]
        assert await memory.read([old, new, last]) == [a_block(seed) for seed in range(3)]


@pytest.mark.parametrize("seed", range(4))
async def test_any_order_of_calls_keeps_every_byte(seed: int) -> None:
    source = random.Random(seed)
    async with a_memory(source.choice([1, 3, 7])) as memory:
        held: dict[HeldBlock, bytes] = {}
        running: list[asyncio.Future[Any]] = []

        async def check(blocks: list[HeldBlock], expected: list[bytes]) -> None:
            assert await memory.read(blocks) == expected, f"seed {seed}"

        for number in range(120):
            match source.choice(["put", "put", "read", "free", "wait"]):
                case "put":
                    data = a_block(number)
                    block = memory.hold(data)
                    held[block] = data
                    running.append(asyncio.ensure_future(memory.settle(block, LAYOUT)))
                case "read" if held:
                    some = source.sample(sorted(held, key=held.__getitem__), min(len(held), 5))
                    running.append(asyncio.ensure_future(check(some, [held[b] for b in some])))
                case "free" if held:
                    # A read takes its slots when it first runs.
                    await asyncio.sleep(0)
                    victim = source.choice(sorted(held, key=held.__getitem__))
                    memory.free(victim)
                    del held[victim]
                case "wait":
                    await asyncio.gather(*running)
                    running.clear()
        await asyncio.gather(*running)
        await check(list(held), list(held.values()))


class FailingDevice(ShimDevice):
    broken = False

    def write(self, target: Any, source: Any) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access")
        super().write(target, source)

    def get(self, array: Any) -> Any:
        if self.broken:
            raise RuntimeError("an illegal memory access")
        return super().get(array)


async def test_what_a_failed_device_held_is_lost_and_the_rest_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = FailingDevice()
    async with a_memory(2, device) as memory:
        first, second = [await settled(memory, a_block(seed)) for seed in range(2)]
        device.broken = True
        third = await settled(memory, a_block(2))  # pushes the first out, or would
        assert await memory.read([first, second, third]) == [None, None, a_block(2)]
        fourth = await settled(memory, a_block(3))
        assert on_device([third, fourth]) == [False, False]
        assert await memory.read([fourth]) == [a_block(3)]
    assert caplog.text.count("an illegal memory access") == 1


def test_slots_are_read_by_the_handful_and_checked_where_they_are() -> None:
    slots = BlockSlots(ShimDevice(), LAYOUT, 40)
    data = [a_block(seed) for seed in range(40)]
    for slot, each in enumerate(data):
        slots.write(slot, each)
    order = random.Random(0).sample(range(40), 37)
    assert slots.read(order) == [data[slot] for slot in order]
    assert slots.replace(5, data[6]) == data[5] and slots.read([5]) == [data[6]]
    slots.verify(range(40))
    slots.write(9, data[9][:-70] + b"?" + data[9][-69:])
    with pytest.raises(ChecksumMismatch, match="block 9"):
        slots.verify(range(40))


@pytest.mark.gpu
async def test_gpu_keeps_every_byte() -> None:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    data = [a_block(seed) for seed in range(40)]
    async with a_memory(16, CupyDevice()) as memory:
        blocks = [await settled(memory, each) for each in data]
        assert sum(on_device(blocks)) == 16
        assert await memory.read(blocks) == data
