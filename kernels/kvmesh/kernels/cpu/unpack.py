"""Codes looked up once for many rows of weights, which dot.py then takes as codes of 8 bits.

dot.py looks them up for every ROWS rows again, which costs a fifth of its time with 3 bits; its
sums are exact integers, so no bit depends on which way was taken.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.dot import WIDTHS, Loop
from kvmesh.kernels.cpu.jit import kernel

MANY_ROWS = 16  # from which on it pays

_I8, _I64 = ir.IntType(8), ir.IntType(64)


class _Unpacking(Loop):
    """Stores what Loop would multiply, at its elements' place in a plane of 8 bits."""

    def _row_of_words(
        self, number: Any, firsts: list[Any], signs: list[Any], sums: list[list[list[Any]]]
    ) -> None:
        b = self.b
        for first, sign in zip(firsts, signs, strict=True):
            place = b.mul(b.add(b.mul(number, self.lanes), first), _I64(4))
            word = self._load(place)
            self._prefetch([place])
            for k, octets in self._octets(word, sign):
                row = b.add(b.mul(number, _I64(self.fields)), _I64(k))
                at = b.gep(self.out, [b.add(b.mul(row, self.lanes), first)])
                b.store(octets, b.bitcast(at, octets.type.as_pointer()), align=4)


def _unpack_function(module: Any, path: simd.Portable, bits: int) -> Any:
    """As `dot_function`, whose arguments it takes."""
    name = f"kvmesh_unpack_{path.name}_{bits}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * 10), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    _Unpacking(path, bits, 0, function).emit()
    return function


def _emit(builder: Any, path: simd.Portable, arguments: Any) -> None:
    bits, codes, out, length, lanes, *ahead = arguments
    after = builder.append_basic_block()
    switch = builder.switch(bits, after)
    for width in (width for width in WIDTHS if width < 8):
        block = builder.append_basic_block()
        switch.add_case(_I64(width), block)
        builder.position_at_end(block)
        function = _unpack_function(builder.module, path, width)
        none = _I64(0)
        builder.call(function, [codes, none, none, none, out, length, lanes, lanes, *ahead])
        builder.branch(after)
    builder.position_at_end(after)


def make_unpack(path: str) -> Any:
    """A Numba function of addresses and sizes (int64): (bits, codes, out, length, lanes, addresses
    of the planes that are read next, and then, which come into the caches meanwhile).

    Writes u of every code, uint8 [length / 4, lanes, 4].
    """

    def unpack(
        typing_context: Any, bits: Any, codes: Any, out: Any, length: Any, lanes: Any,
        following: Any, later: Any,
    ) -> Any:  # fmt: skip
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _emit(builder, simd.PATHS[path], arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), emit

    return intrinsic(unpack)


_unpack = make_unpack(simd.CHOSEN)


@kernel
def unpacked(bits: int, planes: Any, room: int, length: int, lanes: int) -> Any:
    """(bits, planes) that stand for the same codes [length, lanes], for `dot_rows`: 8 bits of each,
    written at the address `room`."""
    if bits == 8:
        return bits, planes
    codes, following, later = planes
    _unpack(bits, codes, room, length, lanes, following, later)
    return 8, (room, room, room)
