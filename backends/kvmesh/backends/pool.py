"""What the block pools of all devices check and count alike."""

import numpy as np
import numpy.typing as npt

from kvmesh.backends.base import ModelOptions
from kvmesh.kernels.errors import BlockError
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

_FULL_SEQUENCES = 64  # a pool need not hold more than this many of full length


def count_blocks(
    layout: KvLayout, max_context: int, options: ModelOptions, budget_bytes: int
) -> int:
    """How many blocks a pool has: as asked for, else what the bytes hold and sequences need."""
    if options.num_blocks is not None:
        return options.num_blocks
    blocks_per_sequence = -(-max_context // BLOCK_SIZE)
    return max(1, min(budget_bytes // layout.block_bytes, _FULL_SEQUENCES * blocks_per_sequence))


def check_block_id(block_id: int, num_blocks: int) -> None:
    """Raises ValueError."""
    if not 0 <= block_id < num_blocks:
        raise ValueError(f"block id {block_id} is not in [0, {num_blocks})")


def check_tail(slot: int, num_slots: int, num_tokens: int) -> None:
    """Raises ValueError."""
    if not 0 <= slot < num_slots:
        raise ValueError(f"slot {slot} is not in [0, {num_slots})")
    if not 0 <= num_tokens < BLOCK_SIZE:
        raise ValueError(f"a tail has {num_tokens} tokens, must be in [0, {BLOCK_SIZE})")


def parse_tail(
    layout: KvLayout, num_tokens: int, data: bytes | memoryview
) -> npt.NDArray[np.float32]:
    """fp32 [layers, 2 (K, V), num_tokens, kv heads, head dim]. Raises BlockError for its size."""
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)
    needed, given = 4 * int(np.prod(shape)), memoryview(data).nbytes
    if given != needed:
        raise BlockError(f"a tail of {num_tokens} tokens takes {needed} bytes, not {given}")
    return np.frombuffer(data, "<f4").reshape(shape)
