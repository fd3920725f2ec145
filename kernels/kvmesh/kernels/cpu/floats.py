"""Scores and sums over a tile of floats: a tail, or a block that is not compressed."""

from typing import Any

from numba import types
from numba.core import cgutils as untyped_cgutils

from kvmesh.kernels.cpu.vectors import FLOAT, I64, INT, REAL, WIDE, Emitter, function
from kvmesh.kernels.layout import BLOCK_SIZE

cgutils: Any = untyped_cgutils

_AT_ONCE = 4  # tokens in one pass over a sum


def _score(b: Any, query: Any, keys: Any, out: Any, size: Any) -> None:
    at, one = Emitter(b, WIDE), Emitter(b, 1)
    parts = range(0, BLOCK_SIZE, WIDE)
    totals = [cgutils.alloca_once_value(b, at.real(0.0)) for _ in parts]
    with cgutils.for_range(b, size) as loop:
        factor = at.spread(one.load(FLOAT, query, loop.index))
        row = b.mul(loop.index, I64(BLOCK_SIZE))
        for first, total in zip(parts, totals, strict=True):
            value = at.load(FLOAT, keys, b.add(row, I64(first)))
            b.store(b.fadd(b.load(total), b.fmul(factor, value)), total)
    for first, total in zip(parts, totals, strict=True):
        at.store(FLOAT, b.load(total), out, I64(first))


def _mix(b: Any, weights: Any, values: Any, stride: Any, count: Any, out: Any, size: Any) -> None:
    at, one = Emitter(b, WIDE), Emitter(b, 1)

    def add(first: Any, tokens: int) -> None:
        rows = [b.add(first, I64(t)) for t in range(tokens)]
        factors = [at.spread(one.load(FLOAT, weights, row)) for row in rows]
        with cgutils.for_range(b, b.udiv(size, I64(WIDE))) as loop:
            i = b.mul(loop.index, I64(WIDE))
            total = at.load(FLOAT, out, i)
            for row, factor in zip(rows, factors, strict=True):
                value = at.load(FLOAT, values, b.add(b.mul(row, stride), i))
                total = b.fadd(total, b.fmul(factor, value))
            at.store(FLOAT, total, out, i)

    passes = b.udiv(count, I64(_AT_ONCE))
    with cgutils.for_range(b, passes) as loop:
        add(b.mul(loop.index, I64(_AT_ONCE)), _AT_ONCE)
    with cgutils.for_range(b, count, b.mul(passes, I64(_AT_ONCE))) as loop:
        add(loop.index, 1)


def _scale(b: Any, x: Any, factor: Any, out: Any, size: Any) -> None:
    at = Emitter(b, WIDE)
    factor = at.spread(factor)
    with cgutils.for_range(b, b.udiv(size, I64(WIDE))) as loop:
        i = b.mul(loop.index, I64(WIDE))
        at.store(FLOAT, b.fmul(at.load(FLOAT, x, i), factor), out, i)


# out = x * factor: fp32 (x, factor, out, their size, a multiple of 16)
scaled = function("scaled", _scale, types.none, [INT, REAL, INT, INT])
# out[t] = sum over j of query[j] * keys[j, t], j ascending: fp32 (query, keys [size, 64], out [64],
# size)
score = function("score", _score, types.none, [INT] * 4)
# out[j] += sum over t < count of weights[t] * values[t, j], t ascending: fp32 (weights, values,
# elements from one token's values to the next, count, out, its size, a multiple of 16)
mix = function("mix", _mix, types.none, [INT] * 6)
