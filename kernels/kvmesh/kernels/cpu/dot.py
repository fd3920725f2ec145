"""The loop around simd.py's primitives: out[r, lane] of all lanes of one head's plane."""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvmesh.kernels import codebook
from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.jit import kernel

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))

_LARGEST = np.float32(simd.LARGEST)
_UNIT = np.float32(1 / simd.LARGEST)
_SMALLEST = np.float32(2.0**-100)  # rows below are zeros
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer


class _Loop:
    """Emits one kernel: the codes' width, rows per pass and the instruction set are fixed."""

    def __init__(self, path: Any, bits: int, rows: int, builder: Any, arguments: Any) -> None:
        codes, wide, high, low, out, length, lanes, w_stride, o_stride = arguments
        self.path, self.bits, self.rows, self.b = path, bits, rows, builder
        self.codes, self.wide = self._pointer(codes, _I8), self._pointer(wide, _I16)
        self.high, self.low = self._pointer(high, _I8), self._pointer(low, _I8)
        self.out = self._pointer(out, _I32)
        self.length, self.lanes = length, lanes
        self.w_stride, self.o_stride = w_stride, o_stride
        self.vector = ir.VectorType(_I32, path.lanes)
        if bits < 8:
            grid = [*map(int, codebook.grid(bits))]
            grid = (grid * 16)[:16]
            self.table = ir.Constant(ir.VectorType(_I8, 16), [_I8(u) for u in grid])

    def _pointer(self, address: Any, kind: Any) -> Any:
        return self.b.inttoptr(address, kind.as_pointer())

    def _load(self, offset: Any) -> Any:
        at = self.b.bitcast(self.b.gep(self.codes, [offset]), self.vector.as_pointer())
        return self.b.load(at, align=4)

    def _constant(self, value: int) -> Any:
        return ir.Constant(self.vector, [_I32(value)] * self.path.lanes)

    def _field(self, word: Any, shift: int, mask: int) -> Any:
        """Bits of every byte, moved down by shift (up if negative)."""
        if shift > 0:
            word = self.b.lshr(word, self._constant(shift))
        elif shift < 0:
            word = self.b.shl(word, self._constant(-shift))
        return self.b.and_(word, self._constant(mask * 0x01010101))

    def _octets(self, word: Any, signs: Any, k: int) -> Any:
        """u of four consecutive elements in each lane."""
        octets = ir.VectorType(_I8, 4 * self.path.lanes)
        if self.bits == 8:
            return self.b.bitcast(word, octets)
        width = 2 if self.bits == 3 else self.bits
        index = self._field(word, k * width, (1 << width) - 1)
        if signs is not None:
            index = self.b.or_(index, self._field(signs, k - 2, 4))
        return self.path.lookup(self.b, self.table, self.b.bitcast(index, octets))

    def _word(self, number: Any, first: Any, sums: list[Any]) -> None:
        """Adds one row of words. first: the group's first lane; sums: allocas, by row."""
        b, path = self.b, self.path
        four = _I64(4)
        at = b.mul(b.add(b.mul(number, self.lanes), first), four)
        word, signs = self._load(at), None
        fields = 4 if self.bits in (2, 3) else 8 // self.bits
        if self.bits == 3:
            border = b.udiv(b.mul(self.length, self.lanes), four)
            pair = b.mul(b.add(b.mul(b.lshr(number, _I64(1)), self.lanes), first), four)
            shift = b.trunc(b.mul(b.and_(number, _I64(1)), four), _I32)
            signs = b.lshr(self._load(b.add(border, pair)), simd._splat(b, shift, path.lanes))
        for k in range(fields):
            octets = path.widen(b, self._octets(word, signs, k))
            element = b.add(b.mul(number, _I64(4 * fields)), _I64(4 * k))
            for r in range(self.rows):
                place = b.add(element, b.mul(self.w_stride, _I64(r)))
                weights = path.weights(b, self.wide, (self.high, self.low), place)
                before = [b.load(x) for x in sums[r]]
                for x, value in zip(sums[r], path.add(b, before, octets, weights), strict=True):
                    b.store(value, x)

    def emit(self) -> None:
        b, path = self.b, self.path
        fields = 4 if self.bits in (2, 3) else 8 // self.bits
        words = b.udiv(self.length, _I64(4 * fields))
        groups = b.udiv(self.lanes, _I64(path.lanes))
        sums = [
            [cgutils.alloca_once(b, self.vector) for _ in range(path.sums)]
            for _ in range(self.rows)
        ]
        with cgutils.for_range(b, groups) as group:
            first = b.mul(group.index, _I64(path.lanes))
            for row in sums:
                for x in row:
                    b.store(self._constant(0), x)
            with cgutils.for_range(b, words) as word:
                self._word(word.index, first, sums)
            for r, row in enumerate(sums):
                total = path.total(b, [b.load(x) for x in row])
                at = b.add(first, b.mul(self.o_stride, _I64(r)))
                place = b.bitcast(b.gep(self.out, [at]), self.vector.as_pointer())
                b.store(total, place, align=4)


def make_dot(path: str, bits: int, rows: int) -> Any:
    """A Numba function of addresses and sizes (int64), see simd.py for what it computes.

    (codes, weights i16, their high bytes, their low bytes, out i32, length, lanes, elements
    between rows of weights, of out); writes rows * lanes of out.
    """

    def dot(
        typing_context: Any, codes: Any, wide: Any, high: Any, low: Any, out: Any,
        length: Any, lanes: Any, w_stride: Any, o_stride: Any,
    ) -> Any:  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _Loop(simd.PATHS[path], bits, rows, builder, arguments).emit()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), emit

    return intrinsic(dot)


_ONE_ROW = {bits: make_dot(simd.CHOSEN, bits, 1) for bits in (2, 3, 4, 8)}
_MORE_ROWS = {bits: make_dot(simd.CHOSEN, bits, simd.ROWS) for bits in (2, 3, 4, 8)}
_one2, _one3, _one4, _one8 = _ONE_ROW.values()
_more2, _more3, _more4, _more8 = _MORE_ROWS.values()


@kernel
def _dot_one(
    bits: int, codes: int, w: int, high: int, low: int, out: int, length: int, lanes: int
) -> None:
    if bits == 4:
        _one4(codes, w, high, low, out, length, lanes, length, lanes)
    elif bits == 3:
        _one3(codes, w, high, low, out, length, lanes, length, lanes)
    elif bits == 2:
        _one2(codes, w, high, low, out, length, lanes, length, lanes)
    else:
        _one8(codes, w, high, low, out, length, lanes, length, lanes)


@kernel
def dot_rows(
    bits: int, codes: int, weights: Any, first: int, count: int, out: Any, lanes: int
) -> None:
    """out[r] = the dot products of rows [first, first + count) of weights, count <= ROWS.

    codes: address of one head's plane; weights: Weights of rows [any, length]; out: int32
    [ROWS, at least lanes].
    """
    length = weights.wide.shape[1]
    w, high, low = (
        weights.wide[first:].ctypes.data,
        weights.high[first:].ctypes.data,
        weights.low[first:].ctypes.data,
    )
    stride = out.shape[1]
    if count == simd.ROWS:
        to = out.ctypes.data
        if bits == 4:
            _more4(codes, w, high, low, to, length, lanes, length, stride)
        elif bits == 3:
            _more3(codes, w, high, low, to, length, lanes, length, stride)
        elif bits == 2:
            _more2(codes, w, high, low, to, length, lanes, length, stride)
        else:
            _more8(codes, w, high, low, to, length, lanes, length, stride)
    else:
        for r in range(count):
            to = out[r:].ctypes.data
            at = length * r
            _dot_one(bits, codes, w + 2 * at, high + at, low + at, to, length, lanes)


class Weights(NamedTuple):
    """Rows of 16-bit weights: round(x * LARGEST / largest |x| of the row)."""

    wide: Any  # int16 [rows, length]
    high: Any  # int8 [rows, length], wide = 256 high + low
    low: Any  # int8 [rows, length]
    unit: Any  # fp32 [rows], what a weight of one stands for
    offset: Any  # int32 [rows], 255 times the row's sum


@kernel
def make_weights(rows: int, length: int) -> Any:
    return Weights(
        np.empty((rows, length), np.int16),
        np.empty((rows, length), np.int8),
        np.empty((rows, length), np.int8),
        np.empty(rows, np.float32),
        np.empty(rows, np.int32),
    )


@kernel
def set_weights(weights: Any, row: int, x: Any) -> None:
    """Rounds fp32 [length] into a row."""
    largest = np.float32(0.0)
    for i in range(x.size):
        largest = max(largest, abs(x[i]))
    scale = _LARGEST / largest if largest > _SMALLEST else np.float32(0.0)
    weights.unit[row] = largest * _UNIT
    total = np.int32(0)
    for i in range(x.size):
        whole = np.int32((x[i] * scale + _ROUND) - _ROUND)
        high = (whole + np.int32(128)) >> np.int32(8)
        weights.wide[row, i] = np.int16(whole)
        weights.high[row, i] = np.int8(high)
        weights.low[row, i] = np.int8(whole - (high << np.int32(8)))
        total += whole
    weights.offset[row] = np.int32(255) * total
