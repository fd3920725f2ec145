"""Lays a step out in device memory: which tiles of query rows there are, and which blocks fill.

Pure but for the upload. A piece is the tokens of one segment that lie in one block; a tile is 16
rows of a piece, a row one query token of one query head of the KV head's group.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cuda.device import Device
from kvmesh.kernels.cuda.source import PREFILL_WARPS, ROWS
from kvmesh.kernels.layout import BLOCK_SIZE

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a row's sealed blocks are cut into spans that are summed apart.

    A span has at least `least` blocks, and there are at most `most` of them. They depend on the
    row's position alone, so a result never depends on what else is in the step.
    """

    most: int = 64
    least: int = 4

    def __post_init__(self) -> None:
        if self.most < 1 or self.least < 1:
            raise ValueError(f"most is {self.most}, least is {self.least}: both must be 1 or more")


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What `upload` takes to the device; all int32 but start.

    decode, prefill: [n, 3] tiles (segment, piece, first row), of pieces of at most 16 rows and of
    longer ones; the tiles of a prefill piece are padded to whole thread blocks. token_part [T]: see
    Parts in attend.cu; num_parts of them. filled [F, 2]: (segment, number of its block).
    """

    row_start: Ints
    start: npt.NDArray[np.int64]
    slot: Ints
    tables: Ints
    token_segment: Ints
    token_part: Ints
    num_parts: int
    decode: Ints
    prefill: Ints
    filled: Ints


def plan_step(
    row_start: Ints, start: npt.NDArray[np.int64], slot: Ints, tables: Ints, group: int,
    splitting: Splitting,
) -> HostPlan:  # fmt: skip
    """Arguments as in kernels.cpu.step.StepPlan; group: query heads of one KV head."""
    decode: list[tuple[int, int, int]] = []
    prefill: list[tuple[int, int, int]] = []
    filled: list[tuple[int, int]] = []
    token_part = np.zeros(row_start[-1], np.int32)
    parts = 0
    for segment, first in enumerate(start.tolist()):
        row, end = int(row_start[segment]), first + int(row_start[segment + 1] - row_start[segment])
        position, piece = first, 0
        while position < end:
            border = (position // BLOCK_SIZE + 1) * BLOCK_SIZE
            count = min(border, end) - position
            rows = count * group
            short = rows <= ROWS
            step = splitting.most if short else 1
            own = parts + step * np.arange(count, dtype=np.int32)
            token_part[row : row + count] = own if short else ~own
            parts += step * count
            padded = ROWS if short else -(-rows // (ROWS * PREFILL_WARPS)) * ROWS * PREFILL_WARPS
            (decode if short else prefill).extend(
                (segment, piece, at) for at in range(0, padded, ROWS)
            )
            if position + count == border:
                filled.append((segment, border // BLOCK_SIZE - 1))
            position, piece, row = position + count, piece + 1, row + count
    return HostPlan(
        row_start, start, slot, tables,
        np.repeat(np.arange(len(start), dtype=np.int32), np.diff(row_start)),
        token_part, parts, _tiles(decode), _tiles(prefill),
        np.array(filled, np.int32).reshape(-1, 2),
    )  # fmt: skip


def _tiles(tiles: list[tuple[int, int, int]]) -> Ints:
    return np.array(tiles, np.int32).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A HostPlan in device memory, with the counts that kernels read there. bad int32 [F]."""

    host: HostPlan
    row_start: Any
    start: Any
    slot: Any
    tables: Any
    token_segment: Any
    token_part: Any
    decode: Any
    prefill: Any
    filled: Any
    num_tokens: Any
    num_decode: Any
    num_prefill: Any
    num_filled: Any
    bad: Any


def upload(device: Device, plan: HostPlan) -> DevicePlan:
    def count(n: int) -> Any:
        return device.put(np.array([n], np.int32))

    return DevicePlan(
        host=plan,
        row_start=device.put(plan.row_start),
        start=device.put(plan.start),
        slot=device.put(plan.slot),
        tables=device.put(plan.tables),
        token_segment=device.put(plan.token_segment),
        token_part=device.put(plan.token_part),
        decode=device.put(plan.decode),
        prefill=device.put(plan.prefill),
        filled=device.put(plan.filled),
        num_tokens=count(int(plan.row_start[-1])),
        num_decode=count(len(plan.decode)),
        num_prefill=count(len(plan.prefill)),
        num_filled=count(len(plan.filled)),
        bad=device.zeros((max(1, len(plan.filled)),), np.int32),
    )
