"""Sealed blocks and unfinished ones in main memory."""

import numpy as np
import numpy.typing as npt

from kvmesh.backends.arrays import aligned_zeros
from kvmesh.backends.pool import check_block_id, check_tail, parse_tail
from kvmesh.kernels import block
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout


class CpuPool:
    """The BlockPool of the CPU backend; `blocks` and `tails` are what the kernels work on.

    blocks: uint8 [num_blocks, layout.block_bytes]. tails: fp32
    [num_slots, layers, 2 (K, V), 64, kv heads, head dim].
    """

    def __init__(self, layout: KvLayout, num_blocks: int, num_slots: int) -> None:
        self._layout = layout
        self.blocks = aligned_zeros((num_blocks, layout.block_bytes), np.uint8)
        tail = (layout.num_layers, 2, BLOCK_SIZE, layout.num_kv_heads, layout.head_dim)
        self.tails = aligned_zeros((num_slots, *tail), np.float32)

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_slots(self) -> int:
        return len(self.tails)

    def import_block(self, block_id: int, data: bytes | memoryview) -> None:
        """Verifies first and copies after, so a bad block leaves the pool as it was."""
        check_block_id(block_id, self.num_blocks)
        block.verify(data, self._layout)
        self.blocks[block_id] = np.frombuffer(data, np.uint8)

    def export_block(self, block_id: int) -> bytes:
        data = self._row(block_id).tobytes()
        block.verify(data, self._layout)
        return data

    def verify_block(self, block_id: int) -> None:
        block.verify(self._row(block_id).data, self._layout)

    def import_tail(self, slot: int, num_tokens: int, data: bytes | memoryview) -> None:
        tail = self._tail(slot, num_tokens)
        tail[...] = parse_tail(self._layout, num_tokens, data)

    def export_tail(self, slot: int, num_tokens: int) -> bytes:
        return self._tail(slot, num_tokens).astype("<f4", copy=False).tobytes()

    def _row(self, block_id: int) -> npt.NDArray[np.uint8]:
        check_block_id(block_id, self.num_blocks)
        row: npt.NDArray[np.uint8] = self.blocks[block_id]
        return row

    def _tail(self, slot: int, num_tokens: int) -> npt.NDArray[np.float32]:
        check_tail(slot, self.num_slots, num_tokens)
        return self.tails[slot, :, :, :num_tokens]
