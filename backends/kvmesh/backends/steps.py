"""Checks the segments of a step and lays them out flat, as the kernels and graphs read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from kvmesh.backends.base import Segment, StepShape
from kvmesh.kernels.layout import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step must stay within, all exclusive but max_tokens."""

    vocab_size: int
    max_context: int
    max_tokens: int
    num_blocks: int
    num_slots: int


@dataclass(frozen=True, slots=True)
class FlatStep:
    """S segments of T tokens in all, in the order given.

    row_start: int32 [S + 1]; segment s owns rows [row_start[s], row_start[s + 1]).
    start: int64 [S], position of each segment's first token. slot: int32 [S].
    tables: int32 [S, W], block ids, zero where a sequence has fewer blocks.
    ids, positions: int64 [T]. wanted: int64 [R], rows whose logits are asked for.
    filled: int32 [F], pool ids of the blocks that this step fills to the last token.
    """

    row_start: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int32]
    tables: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    wanted: npt.NDArray[np.int64]
    filled: npt.NDArray[np.int32]
    shape: StepShape


def flatten(segments: Sequence[Segment], limits: StepLimits) -> FlatStep:
    """Raises ValueError, naming the segment, the value and the limit, for a broken contract."""
    counts = [len(segment.token_ids) for segment in segments]
    for index, segment in enumerate(segments):
        _check_segment(index, segment, counts[index], limits)
    _check_whole([segment.slot for segment in segments], sum(counts), limits)
    ends = np.array([0, *accumulate(counts)])
    row_start = ends.astype(np.int32)
    start = np.array([segment.start for segment in segments], np.int64)
    ids = np.concatenate([segment.token_ids for segment in segments]).astype(np.int64, copy=False)
    _check_range("token id", ids, limits.vocab_size)
    wanted = [end - 1 for end, each in zip(ends[1:], segments, strict=True) if each.want_logits]
    tables, filled = _tables(segments, counts)
    _check_range("block id", tables, limits.num_blocks)
    return FlatStep(
        row_start=row_start,
        start=start,
        slot=np.array([segment.slot for segment in segments], np.int32),
        tables=tables,
        ids=ids,
        positions=np.repeat(start - ends[:-1], counts) + np.arange(ends[-1]),
        wanted=np.array(wanted, np.int64),
        filled=filled,
        shape=StepShape.of((s.start, len(s.token_ids), s.want_logits) for s in segments),
    )


def _check_segment(index: int, segment: Segment, count: int, limits: StepLimits) -> None:
    if count == 0:
        raise ValueError(f"segment {index} has no tokens")
    if segment.start < 0 or segment.start + count > limits.max_context:
        raise ValueError(
            f"segment {index} covers positions [{segment.start}, {segment.start + count}), "
            f"the model's context is {limits.max_context} tokens"
        )
    if not 0 <= segment.slot < limits.num_slots:
        raise ValueError(f"segment {index} has slot {segment.slot}, slots are {limits.num_slots}")
    needed = -(-(segment.start + count) // BLOCK_SIZE)
    if len(segment.block_table) < needed:
        raise ValueError(
            f"segment {index} has a block table of {len(segment.block_table)} entries, "
            f"{segment.start + count} tokens need {needed}"
        )


def _check_whole(slots: list[int], tokens: int, limits: StepLimits) -> None:
    if not slots:
        raise ValueError("a step needs at least one segment")
    if tokens > limits.max_tokens:
        raise ValueError(f"a step of {tokens} tokens is over the limit of {limits.max_tokens}")
    if len(set(slots)) != len(slots):
        twice = next(slot for slot in slots if slots.count(slot) > 1)
        raise ValueError(f"slot {twice} is in two segments of one step")


def _check_range(what: str, values: npt.NDArray[np.integer], limit: int) -> None:
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high >= limit:
        raise ValueError(f"{what} {low if low < 0 else high} is not in [0, {limit})")


def _tables(
    segments: Sequence[Segment], counts: list[int]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(tables, filled). Only entries that are read or sealed are copied."""
    full = [(each.start + n) // BLOCK_SIZE for each, n in zip(segments, counts, strict=True)]
    tables = np.zeros((len(segments), max(1, *full)), np.int32)
    filled: list[int] = []
    for row, (segment, end) in enumerate(zip(segments, full, strict=True)):
        tables[row, :end] = segment.block_table[:end]
        first = segment.start // BLOCK_SIZE
        if first < end:
            filled.extend(segment.block_table[first:end].tolist())
    return tables, np.array(filled, np.int32)
