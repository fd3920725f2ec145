"""The steps of sealing, emitted as vectors: on a strip, fp32 [dim, WIDE tokens].

A lane is a token, so each token's order of arithmetic is fixed, reference.py's, whatever the width
of a vector. A strip and its work space stay in the first cache. Addresses and sizes are int64.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils

from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.jit import kernel
from kvmesh.kernels.cpu.vectors import FLOAT, I16, I32, I64, INT, REAL, WIDE, Emitter, function
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.kernels.reference import LARGEST, MAX_SCALE, SMALLEST_NORM2, WEAKEST

cgutils: Any = untyped_cgutils

_SIZE = 0x7FFFFFFF  # of a float: its bits without the sign, which order as sizes do
_INFINITE = 0x7F800000


class Strip(Emitter):
    """Vectors of one token a lane."""

    def __init__(self, b: Any) -> None:
        super().__init__(b, WIDE)

    def row(self, rows: Any, j: Any) -> Any:
        return self.load(FLOAT, rows, self.b.mul(j, I64(WIDE)))

    def set_row(self, rows: Any, j: Any, value: Any) -> None:
        self.store(FLOAT, value, rows, self.b.mul(j, I64(WIDE)))

    def smaller(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered("<", x, y), x, y)

    def each(self, name: str, x: Any) -> Any:
        """An intrinsic function of LLVM, of every lane."""
        name = f"llvm.{name}.v{WIDE}f32"
        call = simd.declared(self.b, name, ir.FunctionType(x.type, [x.type]))
        return self.b.call(call, [x])

    def transposed(self, rows: list[Any]) -> list[Any]:
        """The columns of WIDE vectors: squares of 1, 2, 4... change places across the diagonal."""
        rows = [*rows]
        span = 1
        while span < WIDE:
            low = [WIDE + i - span if i & span else i for i in range(WIDE)]
            high = [WIDE + i if i & span else i + span for i in range(WIDE)]
            for i in (i for i in range(WIDE) if not i & span):
                x, y = rows[i], rows[i + span]
                rows[i], rows[i + span] = (simd.shuffle(self.b, x, y, o) for o in (low, high))
            span *= 2
        return rows


def _finite(b: Any, x: Any, stride: Any, size: Any) -> Any:
    at = Strip(b)
    most = cgutils.alloca_once_value(b, at.integer(0))
    with (
        cgutils.for_range(b, I64(BLOCK_SIZE)) as token,
        cgutils.for_range(b, b.udiv(size, I64(WIDE))) as over,
    ):
        i = b.add(b.mul(token.index, stride), b.mul(over.index, I64(WIDE)))
        bits = b.and_(at.load(I32, x, i), at.integer(_SIZE))
        top = b.load(most)
        b.store(b.select(b.icmp_signed(">", bits, top), bits, top), most)

    def larger(x: Any, y: Any) -> Any:
        return b.select(b.icmp_signed(">", x, y), x, y)

    total = at.reduce([b.load(most)], larger)
    return b.zext(b.icmp_signed("<", total, I32(_INFINITE)), I64)


def _load(
    b: Any, x: Any, stride: Any, center: Any, signs: Any, rows: Any, tile: Any, dim: Any
) -> None:
    """Row by row first: WIDE rows at once would fight for the same lines of the cache."""
    at = Strip(b)
    columns = b.udiv(dim, I64(WIDE))
    with cgutils.for_range(b, I64(WIDE)) as token, cgutils.for_range(b, columns) as over:
        i = b.mul(over.index, I64(WIDE))
        value = at.load(FLOAT, x, b.add(b.mul(token.index, stride), i))
        value = b.fsub(value, at.load(FLOAT, center, i))
        value = at.smaller(at.larger(value, at.real(-LARGEST)), at.real(LARGEST))
        value = b.fmul(value, at.load(FLOAT, signs, i))
        at.store(FLOAT, value, rows, b.add(b.mul(token.index, dim), i))
    with cgutils.for_range(b, columns) as over:
        i = b.mul(over.index, I64(WIDE))
        square = [at.load(FLOAT, rows, b.add(b.mul(dim, I64(t)), i)) for t in range(WIDE)]
        for t, column in enumerate(at.transposed(square)):
            at.set_row(tile, b.add(i, I64(t)), column)


def _squares(b: Any, tile: Any, work: Any, half: Any) -> None:
    at = Strip(b)
    with cgutils.for_range(b, half) as loop:
        first, second = (at.row(tile, j) for j in (loop.index, b.add(loop.index, half)))
        at.set_row(work, loop.index, b.fadd(b.fmul(first, first), b.fmul(second, second)))


def _add_half(b: Any, rows: Any, half: Any) -> None:
    at = Strip(b)
    with cgutils.for_range(b, half) as loop:
        first, second = (at.row(rows, j) for j in (loop.index, b.add(loop.index, half)))
        at.set_row(rows, loop.index, b.fadd(first, second))


def _add_rest(b: Any, rows: Any, count: Any) -> None:
    at = Strip(b)
    with cgutils.for_range(b, count, I64(1)) as loop:
        at.set_row(rows, I64(0), b.fadd(at.row(rows, I64(0)), at.row(rows, loop.index)))


def _norms(b: Any, norm2: Any, norm: Any, inverse: Any, keep: Any) -> None:
    at = Strip(b)
    zero = I64(0)
    square = at.load(FLOAT, norm2, zero)
    some = b.fcmp_ordered(">=", square, at.real(SMALLEST_NORM2))
    size = b.select(some, at.each("sqrt", square), at.real(0.0))
    at.store(FLOAT, size, norm, zero)
    at.store(FLOAT, b.select(some, b.fdiv(at.real(1.0), size), at.real(0.0)), inverse, zero)
    at.store(I32, b.select(some, at.integer(-1), at.integer(0)), keep, zero)


def _half(at: Strip, x: Any) -> Any:
    """The bits of the nearest fp16 of x >= 0, see jit.to_half."""
    b = at.b
    size = at.smaller(x, at.real(MAX_SCALE))
    bits = b.bitcast(size, at.kind(I32))
    odd = b.and_(b.lshr(bits, at.integer(13)), at.integer(1))
    moved = b.add(b.sub(bits, at.integer(0x38000000)), b.add(odd, at.integer(0xFFF)))
    tiny = b.bitcast(b.fadd(size, at.real(0.5)), at.kind(I32))
    tiny = b.sub(tiny, at.integer(0x3F000000))
    small = b.icmp_unsigned("<", bits, at.integer(0x38800000))
    return b.trunc(b.select(small, tiny, b.lshr(moved, at.integer(13))), at.kind(I16))


def _scales(b: Any, sums: Any, norm: Any, out: Any, root: Any, share: Any, unbiased: Any) -> None:
    at = Strip(b)
    zero = I64(0)
    mean = b.fmul(at.load(FLOAT, sums, zero), at.spread(share))
    fitted, kept = at.larger(mean, at.real(WEAKEST)), at.each("sqrt", mean)
    strength = b.select(b.icmp_signed("!=", unbiased, zero), fitted, kept)
    size = at.load(FLOAT, norm, zero)
    scale = _half(at, b.fdiv(b.fmul(size, at.spread(root)), strength))
    some = b.fcmp_ordered(">", size, at.real(0.0))
    scale = b.select(some, scale, at.number(I16, 0))
    b.store(scale, at.place(I16, out, zero), align=2)


def _butterflies(levels: int) -> Any:
    """So many spans in one pass over 2^levels rows, `span` apart; then those 2^levels further."""

    def emit(b: Any, tile: Any, dim: Any, span: Any) -> None:
        at = Strip(b)
        group = b.shl(span, I64(levels))
        with (
            cgutils.for_range(b, b.udiv(dim, group)) as part,
            cgutils.for_range(b, span) as loop,
        ):
            first = b.add(b.mul(part.index, group), loop.index)
            places = [b.add(first, b.mul(span, I64(k))) for k in range(1 << levels)]
            rows = [at.row(tile, j) for j in places]
            for level in range(levels):
                for k in (k for k in range(1 << levels) if not k >> level & 1):
                    x, y = rows[k], rows[k + (1 << level)]
                    rows[k], rows[k + (1 << level)] = b.fadd(x, y), b.fsub(x, y)
            for j, row in zip(places, rows, strict=True):
                at.set_row(tile, j, row)

    return function(f"butterflies_{levels}", emit, types.none, [INT] * 3)


def _combine(b: Any, tile: Any, out: Any, base: Any, count: Any, columns: Any) -> None:
    at, one = Strip(b), Emitter(b, 1)

    def term(row: Any, i: Any, column: Any) -> Any:
        sign = one.load(FLOAT, base, b.add(b.mul(row, count), i))
        return b.fmul(at.spread(sign), at.row(tile, b.add(b.mul(i, columns), column)))

    total = cgutils.alloca_once(b, at.kind(FLOAT))
    with cgutils.for_range(b, count) as over, cgutils.for_range(b, columns) as down:
        row, column = over.index, down.index
        b.store(term(row, I64(0), column), total)
        with cgutils.for_range(b, count, I64(1)) as loop:
            b.store(b.fadd(b.load(total), term(row, loop.index, column)), total)
        at.set_row(out, b.add(b.mul(row, columns), column), b.load(total))


# Whether fp32 [64, size], rows `stride` elements apart, is finite: (x, stride, size) -> 0 or 1
finite = function("finite", _finite, INT, [INT] * 3)
# One strip of vectors x, `stride` elements apart: centered, clamped, times signs, transposed.
# (x, stride, center, signs, work fp32 [WIDE, dim], strip, dim)
load_strip = function("load_strip", _load, types.none, [INT] * 7)
# work [dim / 2] = squares of the strip, the first half's plus the last's: (strip, work, dim / 2)
_square_halves = function("square_halves", _squares, types.none, [INT] * 3)
_add_halves = function("add_halves", _add_half, types.none, [INT] * 2)  # (rows, half of them)
_add_others = function("add_others", _add_rest, types.none, [INT] * 2)  # to the first: (rows, all)
# Of WIDE squared norms, each with WIDE elements: (norm^2, norm, 1 / norm, all ones, or zero for
# a zero vector)
norms = function("norms", _norms, types.none, [INT] * 4)
# fp16 scales: (sum of what a or e is the mean of, norm, out, 1 / sqrt dim, 1 / dim, whether keys)
scales = function("scales", _scales, types.none, [INT] * 3 + [REAL, REAL, INT])
_one, _two, _three = (_butterflies(levels) for levels in (1, 2, 3))  # (strip, dim, first span)
# out = (base (x) identity) strip: (strip, out, base, its order, dim / order)
_combined = function("combine", _combine, types.none, [INT] * 5)


@kernel
def sum_by_halves(rows: int, count: int) -> None:
    """Leaves the sum over rows in the first."""
    while count % 2 == 0:
        count //= 2
        _add_halves(rows, count)
    _add_others(rows, count)


@kernel
def sum_squares(strip: int, work: int, dim: int) -> None:
    """Leaves each token's squared norm in the first row of work."""
    half = dim // 2
    _square_halves(strip, work, half)
    sum_by_halves(work, half)


@kernel
def rotate(strip: int, work: int, dim: int, base: int, order: int) -> Any:
    """Unnormalised Hadamard transform of a strip. Returns which of the two it is left in."""
    columns = dim // order
    span = 1
    while 8 * span <= columns:
        _three(strip, dim, span)
        span *= 8
    if 4 * span <= columns:
        _two(strip, dim, span)
    elif 2 * span <= columns:
        _one(strip, dim, span)
    if order == 1:
        return strip
    _combined(strip, work, base, order, columns)
    return work
