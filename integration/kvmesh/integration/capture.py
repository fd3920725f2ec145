"""Queries, keys and values of a real model, and the mean keys and values that its codec needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from kvmesh.backends.base import ModelOptions, Segment
from kvmesh.backends.cpu.model import CpuModel
from kvmesh.backends.models.loader import Checkpoint
from kvmesh.integration.needle import MAX_FACTS, make_case
from kvmesh.kernels.layout import BLOCK_SIZE

Floats = npt.NDArray[np.float32]
CALIBRATION_SEED = 60_000  # of needle documents; evaluations and captures draw from other ranges
CAPTURE_SEED = 61_000
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


def needle_tokens(tokenizer: Tokenizer, tokens: int, seed: int) -> npt.NDArray[np.int64]:
    """Ids of a document with facts, `tokens` of them at most. int64 [any]."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    text = make_case(seed, tokens, MAX_FACTS, count).prompt
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
    return np.array(ids, np.int64)


def capture(checkpoint: Checkpoint, token_ids: npt.NDArray[np.int64]) -> Capture:
    """Runs one sequence through the model on the CPU. token_ids: int64 [tokens], > 0 of them.

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
            part = token_ids[start : start + _STEP_TOKENS]
            model.forward([Segment(0, start, part, table, want_logits=False)])
    finally:
        model.close()
    q, k, v = (
        np.stack([np.concatenate([step[i] for step in steps]) for steps in seen]) for i in range(3)
    )
    return Capture(q, k, v, checkpoint.centers)


def measure_centers(
    checkpoint: Checkpoint,
    sequences: Sequence[npt.NDArray[np.int64]],
    on_sequence: Callable[[], None] | None = None,
) -> Floats:
    """The mean K and V over all tokens of the sequences: fp32 [layers, 2, kv heads, head dim]."""
    config = checkpoint.config
    total = np.zeros((config.num_layers, 2, config.num_kv_heads, config.head_dim), np.float64)
    for token_ids in sequences:
        found = capture(checkpoint, token_ids)
        for kind, x in enumerate((found.k, found.v)):
            total[:, kind] += x.sum(axis=1, dtype=np.float64)
        if on_sequence is not None:
            on_sequence()
    tokens = sum(map(len, sequences))
    return np.asarray(total / tokens, np.float32)


def read_prompts(path: Path, tokenizer: Tokenizer, limit: int) -> list[npt.NDArray[np.int64]]:
    """One sequence of at most `limit` ids for each line of a text file that is not blank.

    Raises ValueError if the file has none.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no text")
    encoded = [tokenizer.encode(line, add_special_tokens=False).ids[:limit] for line in lines]
    return [np.array(ids, np.int64) for ids in encoded]
