"""A matrix of 32-bit numbers transposed by 8 x 8 squares that stay in registers."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_I32, 8)
cgutils: Any = untyped_cgutils


def _mix(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 8), order))


def _square(b: Any, rows: list[Any]) -> list[Any]:
    """The columns of eight vectors: pairs of rows, then fours, then halves of registers."""
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    pairs = [_mix(b, rows[i], rows[i + 1], order) for i in (0, 2, 4, 6) for order in (low, high)]
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    fours = [
        _mix(b, pairs[i + j], pairs[i + j + 2], order)
        for i in (0, 4)
        for j in (0, 1)
        for order in (low, high)
    ]
    low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [_mix(b, fours[i], fours[i + 4], order) for order in (low, high) for i in range(4)]


def _emit(b: Any, source: Any, target: Any, rows: Any, columns: Any) -> None:
    source, target = (b.inttoptr(x, _I32.as_pointer()) for x in (source, target))
    eight = _I64(8)

    def place(base: Any, row: Any, width: Any, column: Any) -> Any:
        at = b.add(b.mul(row, width), column)
        return b.bitcast(b.gep(base, [at]), _VECTOR.as_pointer())

    with (
        cgutils.for_range(b, b.udiv(columns, eight)) as over,
        cgutils.for_range(b, b.udiv(rows, eight)) as down,
    ):
        row, column = b.mul(down.index, eight), b.mul(over.index, eight)
        square = [
            b.load(place(source, b.add(row, _I64(i)), columns, column), align=4) for i in range(8)
        ]
        for i, vector in enumerate(_square(b, square)):
            b.store(vector, place(target, b.add(column, _I64(i)), rows, row), align=4)


def _transpose(typing_context: Any, source: Any, target: Any, rows: Any, columns: Any) -> Any:
    """Writes source [rows, columns] as target [columns, rows].

    Addresses and sizes, int64; both sizes are multiples of 8, elements have 4 bytes, matrices are
    contiguous and do not overlap.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


transpose: Any = intrinsic(_transpose)
