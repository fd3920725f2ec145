"""Blocks in a device's memory; the least recently used go to main memory when it is full.

All that decides runs on the event loop. One thread talks to the device and does its jobs in the
order they were given, so a slot may be given on at once: what was asked of it before is done first.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from kvmesh.kernels.cuda.device import Device
from kvmesh.kernels.cuda.slots import BlockSlots
from kvmesh.kernels.layout import KvLayout
from kvmesh.services.kvcache.memory import HeldBlock

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class DeviceMemory:
    """Implements memory.BlockMemory.

    max_bytes: of blocks on the device. The first block decides which layout they have; blocks of
    another stay in main memory. After the device's first error all new ones do, and what it held is
    lost: a read says so, and the block is computed anew.
    """

    def __init__(self, device: Device, max_bytes: int) -> None:
        self._device, self._max_bytes = device, max_bytes
        self._thread = ThreadPoolExecutor(1, "kvcache-device")
        self._slots: BlockSlots | None = None  # made and used by the thread alone
        self._layout: KvLayout | None = None
        self._unused: list[int] = []
        self._placed: OrderedDict[HeldBlock, None] = OrderedDict()  # the least recently used first
        self._failed = False

    @property
    def device_bytes(self) -> int:
        return 0 if self._layout is None else len(self._placed) * self._layout.block_bytes

    def hold(self, data: bytes) -> HeldBlock:
        return HeldBlock(len(data), data)

    async def settle(self, block: HeldBlock, layout: KvLayout) -> None:
        """To the device, where it may push another out; returns when it is there."""
        if self._layout is None:
            self._layout = layout
            self._unused = list(range(self._max_bytes // layout.block_bytes))[::-1]
        data = block.data
        if self._failed or block.freed or data is None or layout != self._layout:
            return
        victim = None
        if self._unused:
            slot = self._unused.pop()
        elif self._placed:
            victim, _ = self._placed.popitem(last=False)
            assert victim.slot is not None
            slot, victim.slot = victim.slot, None
        else:
            return  # every slot is on its way to some block
        job = self._submit(partial(self._write, slot, data, victim is not None))
        if victim is not None:
            victim.pending = job
        job.add_done_callback(partial(self._written, block, slot, victim))
        await asyncio.wait([job])

    async def read(self, blocks: Sequence[HeldBlock]) -> list[bytes | None]:
        # The job is given before anything is awaited: the slots are still these blocks'.
        placed = {block: block.slot for block in blocks if block.slot is not None}
        for block in placed:
            self._placed.move_to_end(block)
        slots = list(placed.values())
        jobs = [self._submit(partial(self._read, slots))] if slots else []
        in_memory = {block: block.data for block in blocks if block.data is not None}
        pending = {block: block.pending for block in blocks if block.pending is not None}
        waited: list[asyncio.Future[Any]] = [*jobs, *pending.values()]
        if waited:
            await asyncio.wait(waited)
        read = self._result(jobs[0]) if jobs else None
        found = dict(zip(placed, read, strict=True)) if read is not None else {}
        brought = {block: self._result(job) for block, job in pending.items()}
        return [in_memory.get(b) or found.get(b) or brought.get(b) for b in blocks]

    def free(self, block: HeldBlock) -> None:
        block.freed = True
        if block.slot is not None:
            self._unused.append(block.slot)
            del self._placed[block]
            block.slot = None

    async def close(self) -> None:
        """Returns when the device is done with what was asked of it."""
        await asyncio.to_thread(self._thread.shutdown)

    def _submit(self, work: Callable[[], _Result]) -> "asyncio.Future[_Result]":
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _write(self, slot: int, data: bytes, replace: bool) -> bytes | None:
        """Runs in the thread. Returns the bytes of the block that was there, if it is one."""
        if self._slots is None:
            assert self._layout is not None
            count = self._max_bytes // self._layout.block_bytes
            self._slots = BlockSlots(self._device, self._layout, count)
        if replace:
            return self._slots.replace(slot, data)
        self._slots.write(slot, data)
        return None

    def _read(self, slots: Sequence[int]) -> list[bytes]:
        """Runs in the thread, after what filled the slots."""
        assert self._slots is not None
        return self._slots.read(slots)

    def _written(
        self, block: HeldBlock, slot: int, victim: HeldBlock | None,
        job: "asyncio.Future[bytes | None]",
    ) -> None:  # fmt: skip
        """On the loop, as soon as the job is over, whoever still waits for it."""
        if victim is not None:
            victim.pending, victim.data = None, self._result(job)
        if job.exception() is not None:
            self._fail(job.exception())
        elif block.freed:
            self._unused.append(slot)
        else:
            block.slot, block.data = slot, None
            self._placed[block] = None

    def _result(self, job: "asyncio.Future[_Result]") -> _Result | None:
        error = job.exception()
        if error is None:
            return job.result()
        self._fail(error)
        return None

    def _fail(self, error: BaseException | None) -> None:
        if not self._failed:
            logger.error("blocks stay in main memory from now on: %r", error)
        self._failed = True
