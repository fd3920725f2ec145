"""The steps that a model runs when it is opened, so that its first estimate is a measurement."""

import numpy as np

from kvmesh.backends.base import Segment
from kvmesh.backends.steps import StepLimits
from kvmesh.kernels.layout import BLOCK_SIZE

_TOKENS = 128
_SEQUENCES = 8


def warm_up_steps(limits: StepLimits) -> list[list[Segment]]:
    """Two prefills of different length, one decode step after the first, one of many sequences.

    They use the first blocks and slots of an empty pool: the prefill's `_TOKENS // 64 + 1` blocks
    at most, and `_SEQUENCES` slots. Empty if the model holds no two tokens.
    """
    count = min(_TOKENS, limits.max_tokens, limits.max_context - 1)
    count = min(count, limits.num_blocks * BLOCK_SIZE - 1)
    if count < 1:
        return []
    table = np.arange(limits.num_blocks, dtype=np.int32)
    prompt, token = np.zeros(count, np.int64), np.zeros(1, np.int64)
    slots = range(min(_SEQUENCES, limits.num_slots, limits.max_tokens))
    return [
        [Segment(0, 0, prompt, table)],
        [Segment(0, 0, prompt[: count // 2 + 1], table)],
        [Segment(0, count, token, table)],
        [Segment(slot, 0, token, table) for slot in slots],
    ]


def touched(limits: StepLimits) -> tuple[int, int]:
    """(blocks, slots), counted from the first, that the steps write to."""
    return (
        min(_TOKENS // BLOCK_SIZE + 1, limits.num_blocks),
        min(_SEQUENCES, limits.num_slots),
    )
