"""Queries, keys and values of a real model, and the mean keys and values that its codec needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.backends.base import ModelOptions, Segment
from kvmesh.backends.cpu.model import CpuModel
from kvmesh.backends.models.loader import Checkpoint
from kvmesh.kernels.layout import BLOCK_SIZE

Floats = npt.NDArray[np.float32]
_STEP_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Capture:
    """What one sequence's attention saw, in full precision, q and k after RoPE.

    q: fp32 [layers, tokens, query heads, head dim]; k, v: fp32 [layers, tokens, kv heads, head
    dim]. centers: fp32 [layers, 2, kv heads, head dim], those of the checkpoint.
    """

    q: Floats
    k: Floats
    v: Floats
    centers: Floats


def capture(checkpoint: Checkpoint, token_ids: Sequence[int]) -> Capture:
    """Runs one sequence through the model on the CPU. token_ids: > 0 of them.

    Raises ValueError if they do not fit the model's context.
    """
    limit = checkpoint.config.max_context
    if not 0 < len(token_ids) <= limit:
        raise ValueError(f"a sequence of {len(token_ids)} tokens, the model takes 1 to {limit}")
    blocks = -(-len(token_ids) // BLOCK_SIZE)
    options = ModelOptions(
        codec="fp32", num_blocks=blocks, num_slots=1, max_step_tokens=_STEP_TOKENS
    )
    seen: list[list[tuple[Floats, Floats, Floats]]] = [
        [] for _ in range(checkpoint.config.num_layers)
    ]
    model = CpuModel(checkpoint, options)
    model.watch = lambda layer, qkv: seen[layer].append(
        (qkv[0].copy(), qkv[1].copy(), qkv[2].copy())
    )
    table = np.arange(blocks, dtype=np.int32)
    try:
        for start in range(0, len(token_ids), _STEP_TOKENS):
            part = np.array(token_ids[start : start + _STEP_TOKENS], np.int64)
            model.forward([Segment(0, start, part, table, want_logits=False)])
    finally:
        model.close()
    q, k, v = (
        np.stack([np.concatenate([step[i] for step in steps]) for steps in seen]) for i in range(3)
    )
    return Capture(q, k, v, checkpoint.centers)


@dataclass(frozen=True, slots=True)
class Centers:
    """mean: fp32 [layers, 2 (K, V), kv heads, head dim] over `tokens` tokens.

    share: fp64 [layers, 2], the part of the mean squared norm that is the mean's.
    """

    mean: Floats
    share: npt.NDArray[np.float64]
    tokens: int


def measure_centers(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    on_sequence: Callable[[], None] = lambda: None,
) -> Centers:
    """The mean K and V over all tokens of the sequences, at least one."""
    config = checkpoint.config
    total = np.zeros((config.num_layers, 2, config.num_kv_heads, config.head_dim), np.float64)
    squares = np.zeros((config.num_layers, 2), np.float64)
    for token_ids in sequences:
        found = capture(checkpoint, token_ids)
        for kind, x in enumerate((found.k, found.v)):
            total[:, kind] += x.sum(axis=1, dtype=np.float64)
            squares[:, kind] += np.square(x, dtype=np.float64).sum(axis=(1, 2, 3))
        on_sequence()
    tokens = sum(map(len, sequences))
    mean = total / tokens
    share = (mean**2).sum(axis=(2, 3)) / (squares / tokens)
    return Centers(mean.astype(np.float32), share, tokens)
