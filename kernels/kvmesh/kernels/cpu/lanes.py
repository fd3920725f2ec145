"""Arithmetic on rows of a tile. Rows have 64 elements where no size is given."""

from collections.abc import Sequence
from typing import Any

from numba import types
from numba.core import cgutils as untyped_cgutils

from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    INT,
    REAL,
    ROUND,
    ROUND_BITS,
    WIDE,
    WIDTH,
    Emitter,
    function,
)
from kvmesh.kernels.layout import BLOCK_SIZE

cgutils: Any = untyped_cgutils

SMALLEST = 2.0**-100  # a row of weights without a larger one is zeros


def tile_rows() -> list[Any]:
    """Where the vectors of one row begin."""
    return [I64(at) for at in range(0, BLOCK_SIZE, WIDE)]


def _largest(b: Any, scores: Any, before: Any) -> Any:
    at = Emitter(b, WIDE)
    top = at.reduce([at.load(FLOAT, scores, i) for i in tile_rows()], at.larger)
    return at.larger(top, before)


def _exponents(b: Any, scores: Any, peak: Any) -> Any:
    at = Emitter(b, WIDE)
    top = at.spread(peak)
    weights: list[Any] = []
    rows = tile_rows()
    for some in (rows[n : n + 4] for n in range(0, len(rows), 4)):
        weights += at.exp2([b.fsub(at.load(FLOAT, scores, i), top) for i in some])
        for i, weight in zip(some, weights[-4:], strict=True):
            at.store(FLOAT, weight, scores, i)
    return at.reduce(weights, b.fadd)


def _accumulate(
    b: Any, dots: Any, stride: Any, mixed: Any, size: Any, count: Any, unit: Any, units: Any,
    offsets: Any, fades: Any,
) -> None:  # fmt: skip
    at, one = Emitter(b, WIDE), Emitter(b, 1)
    with cgutils.for_range(b, count) as rows:
        row = rows.index
        own = at.spread(b.fmul(one.load(FLOAT, units, row), unit))
        offset, fade = (
            at.spread(one.load(kind, x, row)) for kind, x in ((I32, offsets), (FLOAT, fades))
        )
        from_dots, into = b.mul(row, stride), b.mul(row, size)
        with cgutils.for_range(b, b.udiv(size, I64(WIDE))) as loop:
            i = b.mul(loop.index, I64(WIDE))
            dot = at.load(I32, dots, b.add(from_dots, i))
            more = b.fmul(at.centered(dot, offset), own)
            place = b.add(into, i)
            sum_of_both = at.fused(at.load(FLOAT, mixed, place), fade, more)
            at.store(FLOAT, sum_of_both, mixed, place)


def _add_products(b: Any, x: Any, y: Any, size: Any) -> Any:
    at = Emitter(b)
    total = cgutils.alloca_once_value(b, at.real(0.0))
    with cgutils.for_range(b, b.udiv(size, I64(WIDTH))) as loop:
        i = b.mul(loop.index, I64(WIDTH))
        product = b.fmul(at.load(FLOAT, x, i), at.load(FLOAT, y, i))
        b.store(b.fadd(b.load(total), product), total)
    return at.reduce([b.load(total)], b.fadd)


def _round(
    b: Any, x: Any, size: Any, wide: Any, high: Any, low: Any, unit: Any, offset: Any
) -> None:
    at = Emitter(b, WIDE)
    steps = b.udiv(size, I64(WIDE))
    top = cgutils.alloca_once_value(b, at.real(0.0))
    with cgutils.for_range(b, steps) as loop:
        value = at.load(FLOAT, x, b.mul(loop.index, I64(WIDE)))
        b.store(at.larger(at.absolute(value), b.load(top)), top)
    one = Emitter(b, 1)
    of_one, factor = unit_and_factor(one, at.reduce([b.load(top)], at.larger))
    one.store(FLOAT, of_one, unit, I64(0))
    factor = at.spread(factor)
    total = cgutils.alloca_once_value(b, at.integer(0))
    with cgutils.for_range(b, steps) as loop:
        i = b.mul(loop.index, I64(WIDE))
        whole = set_whole(at, b.fmul(at.load(FLOAT, x, i), factor), (wide, high, low), i)
        b.store(b.add(b.load(total), whole), total)
    one.store(I32, b.mul(at.reduce([b.load(total)], b.add), I32(255)), offset, I64(0))


def unit_and_factor(at: Emitter, most: Any) -> tuple[Any, Any]:
    """What a weight of one stands for in a row whose largest is `most`, and what to multiply by."""
    b = at.b
    some = b.fcmp_ordered(">", most, at.real(SMALLEST))
    factor = b.select(some, b.fdiv(at.real(float(simd.LARGEST)), most), at.real(0.0))
    return b.fmul(most, at.real(1 / simd.LARGEST)), factor


def set_whole(at: Emitter, value: Any, outs: Sequence[Any], i: Any) -> Any:
    """Writes the nearest integers of one vector, and returns them. outs: addresses of 16-bit
    integers, of high and of low bytes; only those are written that the CPU's products take."""
    b = at.b
    moved = b.bitcast(b.fadd(value, at.real(ROUND)), at.kind(I32))
    whole = b.sub(moved, at.integer(ROUND_BITS))
    if simd.PATHS[simd.CHOSEN].split:
        upper = b.ashr(b.add(whole, at.integer(128)), at.integer(8))
        for part, out in zip((upper, whole), outs[1:], strict=True):
            b.store(b.trunc(part, at.kind(I8)), at.place(I8, out, i), align=1)
    else:
        order = [n // 4 * 4 + simd.ORDER[n % 4] for n in range(at.width)]
        short = b.trunc(whole, at.kind(I16))
        short = simd.shuffle(b, short, short, order)
        b.store(short, at.place(I16, outs[0], i), align=2)
    return whole


def _fetch_row(b: Any, address: Any) -> None:
    for line in range(0, 2 * BLOCK_SIZE, 64):
        simd.prefetch(b, b.add(address, I64(line)))


# (scores, a score) -> the largest of all
largest = function("largest", _largest, REAL, [INT, REAL])
# Scores become 2^(score - peak): (scores, peak) -> their sum, added up by halves
exponents = function("exponents", _exponents, REAL, [INT, REAL])
# (fp32 x, y, their size) -> the sum of x * y, each eighth product to one lane, lanes by halves
add_products = function("add_products", _add_products, REAL, [INT] * 3)
# fp32 x of a size that is a multiple of eight, to one row of dot.py's Weights
round_row = function("round_row", _round, types.none, [INT] * 7)
# mixed = mixed * fade + unit * units * (2 dots - offset), of so many rows of `size` elements.
# (dots [count, stride], stride, mixed, size, count, unit, units, offsets, fades)
accumulate = function("accumulate", _accumulate, types.none, [INT] * 5 + [REAL] + [INT] * 3)
# Brings a row of fp16 at an address into the cache.
fetch_halves = function("fetch_halves", _fetch_row, types.none, [INT], "alwaysinline")
