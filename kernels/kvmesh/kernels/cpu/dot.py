"""The loop around simd.py's primitives: out[r, lane] of all lanes of one head's plane."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvmesh.kernels import codebook
from kvmesh.kernels.cpu import simd

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


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
