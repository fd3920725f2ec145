"""Lays a step out in device memory: which tiles of query rows there are, and which blocks fill.

Pure but for the upload. A piece is the tokens of one segment that lie in one block; a tile is 16
rows of a piece, a row one query token of one query head of the KV head's group.
"""

import math
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
class Grid:
    """How far the launches of a step reach; those of a captured one may reach further than it.

    decode, prefill: tiles. filled: blocks. Counts of the step itself are in device memory.
    """

    tokens: int
    segments: int
    table_width: int
    num_parts: int
    decode: int
    prefill: int = 0
    filled: int = 0

    def holds(self, other: "Grid") -> bool:
        """Whether a step of that size runs within this one."""
        return all(getattr(self, name) >= getattr(other, name) for name in self.__slots__)


def grid_of(plan: HostPlan) -> Grid:
    """The smallest that holds the step."""
    return Grid(
        tokens=int(plan.row_start[-1]),
        segments=len(plan.start),
        table_width=plan.tables.shape[1],
        num_parts=plan.num_parts,
        decode=len(plan.decode),
        prefill=len(plan.prefill),
        filled=len(plan.filled),
    )


def decode_grid(tokens: int, table_width: int, splitting: Splitting) -> Grid:
    """Holds every step of so many tokens whose pieces are all short and that fills no block."""
    return Grid(tokens, tokens, table_width, tokens * splitting.most, decode=tokens)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A HostPlan in device memory, with the counts that kernels read there. bad int32 [F]."""

    grid: Grid
    host: HostPlan | None  # None: it changes from step to step
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


_ALIGNMENT = 16  # bytes
_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_COUNTS = ("num_tokens", "num_decode", "num_prefill", "num_filled")


def _sections(grid: Grid) -> tuple[dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]], int]:
    """Where each array of a plan lies in one piece of memory: (offset, dtype, shape); and its size.

    One copy takes a whole plan to the device.
    """
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "start": (_INT64, (grid.segments,)),
        "row_start": (_INT32, (grid.segments + 1,)),
        "slot": (_INT32, (grid.segments,)),
        "tables": (_INT32, (grid.segments, grid.table_width)),
        "token_segment": (_INT32, (grid.tokens,)),
        "token_part": (_INT32, (grid.tokens,)),
        "decode": (_INT32, (grid.decode, 3)),
        "prefill": (_INT32, (grid.prefill, 3)),
        "filled": (_INT32, (grid.filled, 2)),
        **dict.fromkeys(_COUNTS, (_INT32, (1,))),
    }
    found, at = {}, 0
    for name, (dtype, shape) in shapes.items():
        found[name] = (at, dtype, shape)
        at += -(-dtype.itemsize * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return found, at


def _pack(plan: HostPlan, grid: Grid) -> npt.NDArray[np.uint8]:
    """The plan's bytes, laid out for `grid`; what the step does not reach is zero."""
    sections, size = _sections(grid)
    packed = np.zeros(size, np.uint8)
    counts = (int(plan.row_start[-1]), len(plan.decode), len(plan.prefill), len(plan.filled))
    numbers = dict(zip(_COUNTS, counts, strict=True))
    for name, (at, dtype, shape) in sections.items():
        end = at + dtype.itemsize * math.prod(shape)
        target = packed[at:end].view(dtype).reshape(shape)
        value = np.array([numbers[name]]) if name in numbers else getattr(plan, name)
        target[tuple(slice(length) for length in value.shape)] = value
    return packed


def _views(memory: Any, grid: Grid) -> dict[str, Any]:
    return {
        name: memory[at : at + dtype.itemsize * math.prod(shape)].view(dtype).reshape(shape)
        for name, (at, dtype, shape) in _sections(grid)[0].items()
    }


def upload(device: Device, plan: HostPlan) -> DevicePlan:
    """In memory of its own."""
    grid = grid_of(plan)
    memory = device.put(_pack(plan, grid))
    bad = device.zeros((max(1, grid.filled),), np.int32)
    return DevicePlan(grid=grid, host=plan, bad=bad, **_views(memory, grid))


class PlanBuffer:
    """Device memory for one plan after the other, at addresses that stay: what a captured step
    reads."""

    def __init__(self, device: Device, grid: Grid) -> None:
        self._device = device
        self._memory = device.zeros((_sections(grid)[1],), np.uint8)
        bad = device.zeros((max(1, grid.filled),), np.int32)
        self.plan = DevicePlan(grid=grid, host=None, bad=bad, **_views(self._memory, grid))

    def load(self, plan: HostPlan) -> None:
        """The next launches of `self.plan` do this step. Raises ValueError if it does not fit."""
        if not self.plan.grid.holds(grid_of(plan)):
            raise ValueError(f"{grid_of(plan)} does not fit into {self.plan.grid}")
        self._device.write(self._memory, _pack(plan, self.plan.grid))
