"""Sums and the Hadamard transform over the rows of a tile, fp32 [dim, 64 tokens].

Every step is a loop over 64 tokens, so each token's order of arithmetic is fixed: reference.py's.
"""

from typing import Any

from kvmesh.kernels.cpu.jit import kernel
from kvmesh.kernels.layout import BLOCK_SIZE


@kernel
def _add_rows(rows: Any, j: int, other: int) -> None:
    into, more = rows[j], rows[other]
    for t in range(BLOCK_SIZE):
        into[t] = into[t] + more[t]


@kernel
def sum_by_halves(rows: Any, count: int) -> None:
    """Leaves the sum over rows [count, 64] in row 0."""
    while count % 2 == 0:
        count //= 2
        for j in range(count):
            _add_rows(rows, j, j + count)
    for j in range(1, count):
        _add_rows(rows, 0, j)


@kernel
def _butterfly(tile: Any, j: int, span: int) -> None:
    first, second = tile[j], tile[j + span]
    for t in range(BLOCK_SIZE):
        low = first[t]
        high = second[t]
        first[t] = low + high
        second[t] = low - high


@kernel
def _butterflies(tile: Any, j: int, span: int) -> None:
    """Two spans in one pass over four rows: j, j + span, j + 2 span, j + 3 span."""
    r0, r1, r2, r3 = tile[j], tile[j + span], tile[j + 2 * span], tile[j + 3 * span]
    for t in range(BLOCK_SIZE):
        a = r0[t] + r1[t]
        b = r0[t] - r1[t]
        c = r2[t] + r3[t]
        d = r2[t] - r3[t]
        r0[t] = a + c
        r1[t] = b + d
        r2[t] = a - c
        r3[t] = b - d


@kernel
def rotate(tile: Any, base: Any, work: Any) -> None:
    """Unnormalised Hadamard transform over the rows of fp32 [dim, 64], in place; work: as tile."""
    count = base.shape[0]
    columns = tile.shape[0] // count
    span = 1
    while 4 * span <= columns:
        for start in range(0, tile.shape[0], 4 * span):
            for j in range(start, start + span):
                _butterflies(tile, j, span)
        span *= 4
    if span < columns:
        for start in range(0, tile.shape[0], 2 * span):
            for j in range(start, start + span):
                _butterfly(tile, j, span)
    if count > 1:
        work[:] = tile
        for j in range(tile.shape[0]):
            into = tile[j]
            sign = base[j // columns, 0]
            row = work[j % columns]
            for t in range(BLOCK_SIZE):
                into[t] = sign * row[t]
            for i in range(1, count):
                sign = base[j // columns, i]
                row = work[i * columns + j % columns]
                for t in range(BLOCK_SIZE):
                    into[t] = into[t] + sign * row[t]
