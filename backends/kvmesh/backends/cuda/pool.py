"""Sealed blocks and unfinished ones in device memory."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.backends.errors import BackendUnavailable
from kvmesh.backends.pool import check_block_id, check_tail, parse_tail
from kvmesh.kernels import block
from kvmesh.kernels.cuda.blocks import BlockTools
from kvmesh.kernels.cuda.device import Device
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout


class DevicePool:
    """The BlockPool of the CUDA backend; `blocks` and `tails` are what the kernels work on.

    blocks: device uint8 [num_blocks, layout.block_bytes]. tails: device fp32
    [num_slots, layers, 2 (K, V), 64, kv heads, head dim]. Raises BackendUnavailable if they are
    more than the device has free.
    """

    def __init__(self, device: Device, layout: KvLayout, num_blocks: int, num_slots: int) -> None:
        self._device, self._layout = device, layout
        self._tools = BlockTools(device, layout)
        self._shape = num_blocks, num_slots
        tail = (layout.num_layers, 2, BLOCK_SIZE, layout.num_kv_heads, layout.head_dim)
        needed = num_blocks * layout.block_bytes + num_slots * 4 * math.prod(tail)
        free = device.describe().free_bytes
        if needed > free:
            reason = (
                f"{num_blocks} blocks and {num_slots} slots take {needed:,} bytes of the device, "
                f"{free:,} are free; set workers.blocks or workers.slots lower"
            )
            raise BackendUnavailable(f"backend 'cuda': {reason}", {"cuda": reason})
        self.blocks: Any = device.zeros((num_blocks, layout.block_bytes), np.uint8)
        self.tails: Any = device.zeros((num_slots, *tail), np.float32)

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._shape[0]

    @property
    def num_slots(self) -> int:
        return self._shape[1]

    def import_block(self, block_id: int, data: bytes | memoryview) -> None:
        """Verifies on the host first and copies after, so a bad block leaves the pool as it was."""
        check_block_id(block_id, self.num_blocks)
        block.verify(data, self._layout)
        self._device.write(self.blocks[block_id], np.frombuffer(data, np.uint8))

    def export_block(self, block_id: int) -> bytes:
        """Verifies the copy, so what left the device damaged does not leave here."""
        check_block_id(block_id, self.num_blocks)
        data = self._device.get(self.blocks[block_id]).tobytes()
        block.verify(data, self._layout)
        return data

    def verify_block(self, block_id: int) -> None:
        """On the device. Checks what a block holds, and not anew whose it is: only blocks that
        were verified or sealed here come into the pool, and the checksum covers the header."""
        check_block_id(block_id, self.num_blocks)
        self._tools.verify(self.blocks, block_id)

    def import_tail(self, slot: int, num_tokens: int, data: bytes | memoryview) -> None:
        check_tail(slot, self.num_slots, num_tokens)
        given = parse_tail(self._layout, num_tokens, data)
        whole = np.zeros(self.tails.shape[1:], np.float32)  # one copy to one address
        whole[:, :, :num_tokens] = given
        self._device.write(self.tails[slot], whole)

    def export_tail(self, slot: int, num_tokens: int) -> bytes:
        check_tail(slot, self.num_slots, num_tokens)
        whole: npt.NDArray[np.float32] = self._device.get(self.tails[slot])
        return whole[:, :, :num_tokens].astype("<f4", copy=False).tobytes()

    def clear(self, num_blocks: int, num_slots: int) -> None:
        """Zeros the first blocks and slots, as they are in a new pool."""
        for array, count in ((self.blocks, num_blocks), (self.tails, num_slots)):
            for index in range(count):
                self._device.write(array[index], np.zeros(array.shape[1:], array.dtype))

    def close(self) -> None:
        """Gives the memory back; nothing but the counts and the layout works after. Twice is
        safe."""
        self.blocks = self.tails = None
