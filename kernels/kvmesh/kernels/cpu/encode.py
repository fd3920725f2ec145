"""Codes of a strip (strip.py), and the words of block.py that they become.

Quads are int32 [dim / 4, 64 tokens], each the codes of four dims in four bytes: words of 8 bits as
they are, and words of less are some of them shifted into each other. The values' run along tokens,
so their quads are turned before.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils

from kvmesh.kernels import codebook
from kvmesh.kernels.cpu.jit import kernel
from kvmesh.kernels.cpu.strip import LANES, Strip
from kvmesh.kernels.cpu.vectors import FLOAT, I8, I16, I32, I64, INT, function
from kvmesh.kernels.layout import BLOCK_SIZE

cgutils: Any = untyped_cgutils

QUADS = 16  # rows of quads are a multiple of this, and what dim does not fill is zero


def _to_steps(at: Strip, x: Any, unbiased: Any) -> tuple[Any, Any]:
    """8-bit codes, and what a or e is the mean of (reference.py)."""
    b = at.b
    steps = at.each("ceil", b.fmul(x, at.real(codebook.STEPS_8)))
    steps = at.larger(b.fadd(steps, at.real(127.0)), at.real(0.0))
    steps = at.smaller(steps, at.real(255.0))
    level = b.fsub(steps, at.real(codebook.GRID_MIDDLE))
    level = b.fmul(level, at.real(1 / codebook.STEPS_8))
    code = b.fptosi(steps, at.kind(I32))
    return code, b.fmul(level, b.select(unbiased, x, level))


def _to_levels(at: Strip, x: Any, bits: int, unbiased: Any) -> tuple[Any, Any]:
    """Codes of less than 8 bits, likewise.

    The magnitude is the number of positive borders below |x|, or not above it if x is negative. A
    level and its x have one sign, so what is summed up needs none. Sums of levels' differences are
    exact.
    """
    b = at.b
    half = 1 << (bits - 1)
    levels = codebook.levels(bits)[:half].astype(np.float64)
    borders = codebook.thresholds(bits)[half:].view(np.int32)
    size = at.absolute(x)
    negative = b.fcmp_unordered("<=", x, at.real(0.0))
    moved = b.add(b.bitcast(size, at.kind(I32)), b.zext(negative, at.kind(I32)))
    code = b.select(negative, at.integer(half), at.integer(0))
    level = at.real(levels[0])
    for border, step in zip(borders.tolist(), np.diff(levels).tolist(), strict=True):
        above = b.icmp_signed(">", moved, at.integer(border))
        code = b.add(code, b.zext(above, at.kind(I32)))
        level = b.fadd(level, b.select(above, at.real(step), at.real(0.0)))
    return code, b.fmul(level, b.select(unbiased, size, level))


def _encoder(bits: int) -> Any:
    def emit(
        b: Any, strip: Any, inverse: Any, keep: Any, quads: Any, dim: Any, unbiased: Any
    ) -> None:
        at = Strip(b)
        factor, mask = at.load(FLOAT, inverse, I64(0)), at.load(I32, keep, I64(0))
        keys = b.icmp_signed("!=", unbiased, I64(0))
        with cgutils.for_range(b, b.udiv(dim, I64(4))) as loop:
            quad = at.integer(0)
            for i in range(4):
                j = b.add(b.mul(loop.index, I64(4)), I64(i))
                x = b.fmul(at.row(strip, j), factor)
                if bits == 8:
                    code, product = _to_steps(at, x, keys)
                else:
                    code, product = _to_levels(at, x, bits, keys)
                at.set_row(strip, j, product)
                quad = b.or_(quad, b.shl(code, at.integer(8 * i)))
            at.store(I32, b.and_(quad, mask), quads, b.mul(loop.index, I64(BLOCK_SIZE)))

    return function(f"encode_{bits}", emit, types.none, [INT] * 6)


def _interleaved(at: Strip, x: Any, y: Any, kind: Any) -> list[Any]:
    """Elements of two vectors in turn, as LANES words each: of the first halves, of the last."""
    b = at.b
    width = 32 * LANES // kind.width
    x, y = (b.bitcast(v, ir.VectorType(kind, width)) for v in (x, y))
    order = [i // 2 + width * (i % 2) for i in range(2 * width)]
    both = (at.mix(x, y, some) for some in (order[:width], order[width:]))
    return [b.bitcast(v, at.kind(I32)) for v in both]


def _turn(b: Any, quads: Any, out: Any, rows: Any) -> None:
    at = Strip(b)
    width = b.mul(rows, I64(4))
    with cgutils.for_range(b, b.udiv(rows, I64(LANES))) as over:
        first = b.mul(over.index, I64(LANES))
        for t in range(0, BLOCK_SIZE, LANES):
            places = [b.mul(b.add(first, I64(i)), I64(BLOCK_SIZE)) for i in range(LANES)]
            square = [at.load(I32, quads, b.add(place, I64(t))) for place in places]
            tokens = at.transposed(square)  # each LANES quads, bytes of 4 LANES dims
            for i in range(0, LANES, 4):
                pairs = zip(
                    _interleaved(at, *tokens[i : i + 2], I8),
                    _interleaved(at, *tokens[i + 2 : i + 4], I8),
                    strict=True,
                )
                words = [word for x, y in pairs for word in _interleaved(at, x, y, I16)]
                row = b.mul(width, I64((t + i) // 4))
                for k, word in enumerate(words):
                    place = b.add(row, b.add(b.mul(first, I64(4)), I64(k * LANES)))
                    at.store(I32, word, out, place)


def _packer(width: int, first: int) -> Any:
    """Words of bits [first, first + width) of each code."""
    fields = 8 // width
    mask = ((1 << width) - 1) * 0x01010101

    def emit(b: Any, quads: Any, out: Any, words: Any, lanes: Any, stride: Any) -> None:
        at = Strip(b)
        with (
            cgutils.for_range(b, words) as loop,
            cgutils.for_range(b, b.udiv(lanes, I64(LANES))) as over,
        ):
            lane = b.mul(over.index, I64(LANES))
            word = None
            for k in range(fields):
                row = b.add(b.mul(loop.index, I64(fields)), I64(k))
                quad = at.load(I32, quads, b.add(b.mul(row, stride), lane))
                if first:
                    quad = b.lshr(quad, at.integer(first))
                if width < 8:
                    quad = b.shl(b.and_(quad, at.integer(mask)), at.integer(k * width))
                word = quad if word is None else b.or_(word, quad)
            at.store(I32, word, out, b.add(b.mul(loop.index, lanes), lane))

    return function(f"pack_{width}_{first}", emit, types.none, [INT] * 5)


_encode_2, _encode_3, _encode_4, _encode_8 = (_encoder(bits) for bits in (2, 3, 4, 8))
# (quads, of values out: int32 [16, 4 rows] along tokens, rows)
turn = function("turn_quads", _turn, types.none, [INT] * 3)
# (quads, out, rows of words, lanes of a row, elements between rows of quads)
_pack_8, _pack_4, _pack_2 = (_packer(width, 0) for width in (8, 4, 2))
_pack_signs = _packer(1, 2)


@kernel
def encode(
    bits: int, strip: int, inverse: int, keep: int, quads: int, dim: int, unbiased: int
) -> None:
    """Quads of a strip, which becomes what a or e is the mean of."""
    if bits == 2:
        _encode_2(strip, inverse, keep, quads, dim, unbiased)
    elif bits == 3:
        _encode_3(strip, inverse, keep, quads, dim, unbiased)
    elif bits == 4:
        _encode_4(strip, inverse, keep, quads, dim, unbiased)
    else:
        _encode_8(strip, inverse, keep, quads, dim, unbiased)


@kernel
def pack(bits: int, quads: int, out: int, length: int, lanes: int, stride: int) -> None:
    """Writes the plane of codes [length, lanes]; 3 bits as magnitudes, then signs."""
    if bits == 8:
        _pack_8(quads, out, length // 4, lanes, stride)
    elif bits == 4:
        _pack_4(quads, out, length // 8, lanes, stride)
    else:
        _pack_2(quads, out, length // 16, lanes, stride)
    if bits == 3:
        _pack_signs(quads, out + length // 4 * lanes, -(-length // 32), lanes, stride)
