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
from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.jit import kernel
from kvmesh.kernels.cpu.strip import Strip
from kvmesh.kernels.cpu.vectors import FLOAT, I8, I16, I32, I64, INT, WIDE, function
from kvmesh.kernels.layout import BLOCK_SIZE

cgutils: Any = untyped_cgutils

_PERMUTE = {"avx512": "llvm.x86.avx512.permvar.sf.512", "avx2": "llvm.x86.avx2.permps"}
QUADS = 16  # rows of quads are a multiple of this, and what dim does not fill is zero


def _to_steps(at: Strip, x: Any, kind: int) -> tuple[Any, Any]:
    """8-bit codes, and what a or e is the mean of (reference.py)."""
    b = at.b
    steps = at.each("ceil", b.fmul(x, at.real(codebook.STEPS_8)))
    steps = at.larger(b.fadd(steps, at.real(127.0)), at.real(0.0))
    steps = at.smaller(steps, at.real(255.0))
    level = b.fsub(steps, at.real(codebook.GRID_MIDDLE))
    level = b.fmul(level, at.real(1 / codebook.STEPS_8))
    code = b.fptosi(steps, at.kind(I32))
    return code, b.fmul(level, level if kind else x)


def _choose(at: Strip, values: list[Any], masks: list[Any]) -> Any:
    """One of 2^n values, by n masks that are the bits of its number, the highest first."""
    for mask in reversed(masks):
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [at.b.select(mask, high, low) for low, high in pairs]
    return values[0]


def _level(at: Strip, levels: list[float], masks: list[Any], index: Any) -> Any:
    """One of at most eight, whose number is in a lane of index and, bit by bit, in masks."""
    name = _PERMUTE.get(simd.CHOSEN)
    if name is None:
        return _choose(at, [at.real(level) for level in levels], masks)
    kind, numbers = at.kind(FLOAT), at.kind(I32)
    table = ir.Constant(kind, [FLOAT(level) for level in levels * (WIDE // len(levels))])
    permute = simd.declared(at.b, name, ir.FunctionType(kind, [kind, numbers]))
    return at.b.call(permute, [table, index])


def _to_levels(at: Strip, x: Any, bits: int, kind: int) -> tuple[Any, Any]:
    """Codes of less than 8 bits, likewise.

    The magnitude is the number of positive borders below |x|, or not above it if x is negative:
    found by halving them. A level and its x have one sign, so what is summed up needs none.
    """
    b = at.b
    half = 1 << (bits - 1)
    borders = [at.integer(x) for x in codebook.thresholds(bits)[half:].view(np.int32).tolist()]
    size = at.absolute(x)
    moved = b.bitcast(size, at.kind(I32))
    negative = b.fcmp_unordered("<=", x, at.real(0.0))
    moved = b.select(negative, b.add(moved, at.integer(1)), moved)
    masks: list[Any] = []
    index, step = at.integer(0), half // 2
    while step:
        border = _choose(at, borders[step - 1 :: 2 * step], masks)
        masks.append(b.icmp_signed(">", moved, border))
        index = b.select(masks[-1], b.or_(index, at.integer(step)), index)
        step //= 2
    level = _level(at, codebook.levels(bits)[:half].tolist(), masks, index)
    code = b.select(negative, b.or_(index, at.integer(half)), index)
    return code, b.fmul(level, level if kind else size)


def _encoder(bits: int, kind: int) -> Any:
    """kind: 0 for keys, 1 for values; known when compiled, as it is asked for each vector."""

    def emit(b: Any, strip: Any, inverse: Any, keep: Any, quads: Any, dim: Any) -> None:
        at = Strip(b)
        factor, mask = at.load(FLOAT, inverse, I64(0)), at.load(I32, keep, I64(0))
        with cgutils.for_range(b, b.udiv(dim, I64(4))) as loop:
            quad = at.integer(0)
            for i in range(4):
                j = b.add(b.mul(loop.index, I64(4)), I64(i))
                x = b.fmul(at.row(strip, j), factor)
                if bits == 8:
                    code, product = _to_steps(at, x, kind)
                else:
                    code, product = _to_levels(at, x, bits, kind)
                at.set_row(strip, j, product)
                quad = b.or_(quad, b.shl(code, at.integer(8 * i)))
            at.store(I32, b.and_(quad, mask), quads, b.mul(loop.index, I64(BLOCK_SIZE)))

    return function(f"encode_{kind}_{bits}", emit, types.none, [INT] * 5)


def _interleaved(at: Strip, x: Any, y: Any, kind: Any) -> list[Any]:
    """Elements of two vectors in turn, as WIDE words each: of the first halves, of the last."""
    b = at.b
    width = 32 * WIDE // kind.width
    x, y = (b.bitcast(v, ir.VectorType(kind, width)) for v in (x, y))
    order = [i // 2 + width * (i % 2) for i in range(2 * width)]
    both = (simd.shuffle(b, x, y, some) for some in (order[:width], order[width:]))
    return [b.bitcast(v, at.kind(I32)) for v in both]


def _turn(b: Any, quads: Any, out: Any, rows: Any) -> None:
    at = Strip(b)
    width = b.mul(rows, I64(4))
    with cgutils.for_range(b, b.udiv(rows, I64(WIDE))) as over:
        first = b.mul(over.index, I64(WIDE))
        for t in range(0, BLOCK_SIZE, WIDE):
            places = [b.mul(b.add(first, I64(i)), I64(BLOCK_SIZE)) for i in range(WIDE)]
            square = [at.load(I32, quads, b.add(place, I64(t))) for place in places]
            tokens = at.transposed(square)  # each WIDE quads, bytes of 4 WIDE dims
            for i in range(0, WIDE, 4):
                pairs = zip(
                    _interleaved(at, tokens[i], tokens[i + 1], I8),
                    _interleaved(at, tokens[i + 2], tokens[i + 3], I8),
                    strict=True,
                )
                words = [word for x, y in pairs for word in _interleaved(at, x, y, I16)]
                row = b.mul(width, I64((t + i) // 4))
                for k, word in enumerate(words):
                    place = b.add(row, b.add(b.mul(first, I64(4)), I64(k * WIDE)))
                    at.store(I32, word, out, place)


def _packer(width: int, first: int) -> Any:
    """Words of bits [first, first + width) of each code."""
    fields = 8 // width
    mask = ((1 << width) - 1) * 0x01010101

    def emit(b: Any, quads: Any, out: Any, words: Any, lanes: Any, stride: Any) -> None:
        at = Strip(b)
        with (
            cgutils.for_range(b, words) as loop,
            cgutils.for_range(b, b.udiv(lanes, I64(WIDE))) as over,
        ):
            lane = b.mul(over.index, I64(WIDE))
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


_keys_2, _keys_3, _keys_4, _keys_8 = (_encoder(bits, 0) for bits in (2, 3, 4, 8))
_values_2, _values_3, _values_4, _values_8 = (_encoder(bits, 1) for bits in (2, 3, 4, 8))
# (quads, of values out: int32 [16, 4 rows] along tokens, rows)
turn = function("turn_quads", _turn, types.none, [INT] * 3)
# (quads, out, rows of words, lanes of a row, elements between rows of quads)
_pack_8, _pack_4, _pack_2 = (_packer(width, 0) for width in (8, 4, 2))
_pack_signs = _packer(1, 2)


@kernel
def encode(kind: int, bits: int, strip: int, scale: Any, quads: int, dim: int) -> None:
    """Quads of a strip, which becomes what a or e is the mean of. scale: addresses of 1 / norm and
    of what zero vectors are told by (strip.norms)."""
    inverse, keep = scale
    if bits == 2 and kind == 0:
        _keys_2(strip, inverse, keep, quads, dim)
    elif bits == 3 and kind == 0:
        _keys_3(strip, inverse, keep, quads, dim)
    elif bits == 4 and kind == 0:
        _keys_4(strip, inverse, keep, quads, dim)
    elif kind == 0:
        _keys_8(strip, inverse, keep, quads, dim)
    elif bits == 2:
        _values_2(strip, inverse, keep, quads, dim)
    elif bits == 3:
        _values_3(strip, inverse, keep, quads, dim)
    elif bits == 4:
        _values_4(strip, inverse, keep, quads, dim)
    else:
        _values_8(strip, inverse, keep, quads, dim)


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
