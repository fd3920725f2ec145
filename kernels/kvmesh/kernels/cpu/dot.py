"""The loop around simd.py's primitives: out[r, lane] of all lanes of one head's plane."""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic

from kvmesh.kernels import codebook
from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.jit import kernel

cgutils: Any = untyped_cgutils

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
WIDTHS = (2, 3, 4, 8)

_LARGEST = np.float32(simd.LARGEST)
_UNIT = np.float32(1 / simd.LARGEST)
_SMALLEST = np.float32(2.0**-100)  # rows below are zeros
_SPLIT = simd.PATHS[simd.CHOSEN].split
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer


class _Loop:
    """Emits the body of one function: the codes' width, rows and the instruction set are fixed."""

    def __init__(self, path: simd.Portable, bits: int, rows: int, function: Any) -> None:
        codes, wide, high, low, out, self.length, self.lanes, self.o_stride = function.args
        self.path, self.bits, self.rows = path, bits, rows
        self.b = ir.IRBuilder(function.append_basic_block())
        self.codes, self.wide = self._pointer(codes, _I8), self._pointer(wide, _I16)
        self.high, self.low = self._pointer(high, _I8), self._pointer(low, _I8)
        self.out = self._pointer(out, _I32)
        self.vector = ir.VectorType(_I32, path.lanes)
        self.width = 2 if bits == 3 else bits
        self.fields = 8 // self.width
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
        index = self._field(word, k * self.width, (1 << self.width) - 1)
        if signs is not None:
            index = self.b.or_(index, self._field(signs, k - 2, 4))
        return self.path.lookup(self.b, self.table, self.b.bitcast(index, octets))

    def _word(self, number: Any, first: Any, sums: list[Any]) -> None:
        """Adds one row of words. first: the group's first lane; sums: allocas, by row."""
        b, path = self.b, self.path
        four = _I64(4)
        at = b.mul(b.add(b.mul(number, self.lanes), first), four)
        word, signs = self._load(at), None
        if self.bits == 3:
            border = b.udiv(b.mul(self.length, self.lanes), four)
            pair = b.mul(b.add(b.mul(b.lshr(number, _I64(1)), self.lanes), first), four)
            shift = b.trunc(b.mul(b.and_(number, _I64(1)), four), _I32)
            signs = b.lshr(self._load(b.add(border, pair)), simd.splat(b, shift, path.lanes))
        for k in range(self.fields):
            octets = path.widen(b, self._octets(word, signs, k))
            element = b.add(b.mul(number, _I64(4 * self.fields)), _I64(4 * k))
            for r in range(self.rows):
                place = b.add(element, b.mul(self.length, _I64(r)))
                weights = path.weights(b, self.wide, (self.high, self.low), place)
                before = [b.load(x) for x in sums[r]]
                for x, value in zip(sums[r], path.add(b, before, octets, weights), strict=True):
                    b.store(value, x)

    def emit(self) -> None:
        """One group of lanes after another, all words of it: the sums stay in registers."""
        b, path = self.b, self.path
        words = b.udiv(self.length, _I64(4 * self.fields))
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
        b.ret_void()


def dot_function(module: Any, path: simd.Portable, bits: int, rows: int) -> Any:
    """A module's function for one width and number of rows: compiled once, never inlined.

    Its arguments, int64: addresses of codes, weights, high and low bytes, out; length, lanes,
    elements between rows of out.
    """
    name = f"kvmesh_dot_{path.name}_{bits}_{rows}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * 8), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    _Loop(path, bits, rows, function).emit()
    return function


def _emit_rows(builder: Any, path: simd.Portable, bits: int, arguments: Any) -> None:
    """Calls the largest function that the rows left have work for, until none is left."""
    codes, wide, high, low, out, count, length, lanes, stride = arguments
    done = cgutils.alloca_once_value(builder, _I64(0))
    for rows in (4, 2, 1):
        loop = builder.append_basic_block()
        body = builder.append_basic_block()
        after = builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.load(done)
        enough = builder.icmp_signed("<=", builder.add(at, _I64(rows)), count)
        builder.cbranch(enough, body, after)
        builder.position_at_end(body)
        element = builder.mul(at, length)
        places = (
            builder.add(wide, builder.mul(element, _I64(2))),
            builder.add(high, element),
            builder.add(low, element),
            builder.add(out, builder.mul(builder.mul(at, stride), _I64(4))),
        )
        function = dot_function(builder.module, path, bits, rows)
        builder.call(function, [codes, *places, length, lanes, stride])
        builder.store(builder.add(at, _I64(rows)), done)
        builder.branch(loop)
        builder.position_at_end(after)


def emit_dot(builder: Any, path: simd.Portable, arguments: Any) -> None:
    """Emits the dot products, see make_dot."""
    bits, *rest = arguments
    after = builder.append_basic_block()
    switch = builder.switch(bits, after)
    for width in WIDTHS:
        block = builder.append_basic_block()
        switch.add_case(_I64(width), block)
        builder.position_at_end(block)
        _emit_rows(builder, path, width, rest)
        builder.branch(after)
    builder.position_at_end(after)


def make_dot(path: str) -> Any:
    """A Numba function of addresses and sizes (int64), see simd.py for what it computes.

    (bits, codes, weights i16, their high bytes, their low bytes, out i32, count of rows, length,
    lanes, elements between rows of out); writes count * lanes of out.
    """

    def dot(
        typing_context: Any, bits: Any, codes: Any, wide: Any, high: Any, low: Any, out: Any,
        count: Any, length: Any, lanes: Any, stride: Any,
    ) -> Any:  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            emit_dot(builder, simd.PATHS[path], arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), emit

    return intrinsic(dot)


_dot = make_dot(simd.CHOSEN)


@kernel
def dot_rows(
    bits: int, codes: int, weights: Any, first: int, count: int, out: Any, lanes: int
) -> None:
    """out[r] = the dot products of rows [first, first + count) of weights.

    codes: address of one head's plane; weights: Weights of rows [any, length]; out: int32
    [at least count, at least lanes].
    """
    _dot(
        bits, codes, weights.wide[first:].ctypes.data, weights.high[first:].ctypes.data,
        weights.low[first:].ctypes.data, out.ctypes.data, count, weights.wide.shape[1], lanes,
        out.shape[1],
    )  # fmt: skip


class Weights(NamedTuple):
    """Rows of 16-bit weights: round(x * LARGEST / largest |x| of the row)."""

    wide: Any  # int16 [rows, length], each four in the order of simd.ORDER
    high: Any  # int8 [rows, length], wide = 256 high + low; only where the path splits weights
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
    """Rounds fp32 [length], length a multiple of 4, into a row.

    The largest is found among bit patterns, which order as sizes do: integer loops vectorise.
    """
    most = np.int32(0)
    for i in range(x.size):
        most = max(most, np.float32(abs(x[i])).view(np.int32))
    largest = np.int32(most).view(np.float32)
    scale = _LARGEST / largest if largest > _SMALLEST else np.float32(0.0)
    weights.unit[row] = largest * _UNIT
    total = np.int32(0)
    wide, high, low = weights.wide[row], weights.high[row], weights.low[row]
    for i in range(x.size):
        whole = np.int32((x[i] * scale + _ROUND) - _ROUND)
        wide[i] = np.int16(whole)
        total += whole
    weights.offset[row] = np.int32(255) * total
    if _SPLIT:
        for i in range(x.size):
            upper = (np.int32(wide[i]) + np.int32(128)) >> np.int32(8)
            high[i] = np.int8(upper)
            low[i] = np.int8(np.int32(wide[i]) - (upper << np.int32(8)))
    for i in range(0, x.size, 4):  # simd.ORDER
        second = wide[i + 1]
        wide[i + 1] = wide[i + 2]
        wide[i + 2] = second
