"""A store of sealed blocks in device memory: numbered slots for blocks of one layout."""

from collections.abc import Sequence

import numpy as np

from kvmesh.kernels.cuda.blocks import BlockTools
from kvmesh.kernels.cuda.device import Device
from kvmesh.kernels.layout import KvLayout

_STAGED = 16  # blocks that one copy brings to the host


class BlockSlots:
    """Memory for `count` blocks. Methods are called from one thread at a time."""

    def __init__(self, device: Device, layout: KvLayout, count: int) -> None:
        self._device, self._bytes = device, layout.block_bytes
        self._tools = BlockTools(device, layout)
        self._pool = device.zeros((count, layout.block_bytes), np.uint8)
        self._staging = device.zeros((min(_STAGED, count), layout.block_bytes), np.uint8)

    def write(self, slot: int, data: bytes) -> None:
        """data: a whole block."""
        self._device.write(self._pool[slot], np.frombuffer(data, np.uint8))

    def read(self, slots: Sequence[int]) -> list[bytes]:
        """The blocks, gathered on the device so that few copies bring them all."""
        found: list[bytes] = []
        size = len(self._staging)
        for at in range(0, len(slots), size):
            some = list(slots[at : at + size])
            if len(some) == 1:
                found.append(self._device.get(self._pool[some[0]]).tobytes())
                continue
            self._tools.move(self._staging, range(len(some)), self._pool, some)
            found += [row.tobytes() for row in self._device.get(self._staging[: len(some)])]
        return found

    def replace(self, slot: int, data: bytes) -> bytes:
        """Writes a block over another, which it returns."""
        (old,) = self.read([slot])
        self.write(slot, data)
        return old

    def verify(self, slots: Sequence[int]) -> None:
        """On the device. Raises ChecksumMismatch naming the first slot that is wrong."""
        self._tools.verify(self._pool, list(slots))
