"""Codes looked up once for many rows of weights, which dot.py then takes as codes of 8 bits.

dot.py looks them up for every ROWS rows again, which costs a fifth of its time with 3 bits; its
sums are exact integers, so no bit depends on which way was taken.
"""

from typing import Any

from numba import types

from kvmesh.kernels.cpu import simd, vectors
from kvmesh.kernels.cpu.dot import WIDTHS, Loop, for_width, loop_function
from kvmesh.kernels.cpu.jit import kernel
from kvmesh.kernels.cpu.vectors import I64, INT

MANY_ROWS = 16  # from which on it pays


class _Unpacking(Loop):
    """Stores what Loop would multiply, at its elements' place in a plane of 8 bits."""

    name = "unpack"

    def _row_of_words(
        self, number: Any, firsts: list[Any], signs: list[Any], sums: list[list[list[Any]]]
    ) -> None:
        b = self.b
        for first, sign in zip(firsts, signs, strict=True):
            place = b.mul(b.add(b.mul(number, self.lanes), first), I64(4))
            word = self._load(place)
            self._prefetch([place])
            for k, octets in self._octets(word, sign):
                row = b.add(b.mul(number, I64(self.fields)), I64(k))
                at = b.gep(self.out, [b.add(b.mul(row, self.lanes), first)])
                b.store(octets, b.bitcast(at, octets.type.as_pointer()), align=4)


def make_unpack(path: str) -> Any:
    """A Numba function of addresses and sizes (int64): (bits, codes, out, length, lanes, addresses
    of the planes that are read next, and then, which come into the caches meanwhile).

    Writes u of every code, uint8 [length / 4, lanes, 4].
    """

    def emit(
        b: Any, bits: Any, codes: Any, out: Any, length: Any, lanes: Any, following: Any,
        later: Any,
    ) -> None:  # fmt: skip
        none = I64(0)
        given = [codes, none, none, none, out, length, lanes, lanes, following, later]

        def unpack(width: int) -> None:
            b.call(loop_function(b.module, simd.PATHS[path], width, 0, _Unpacking), given)

        for_width(b, bits, [width for width in WIDTHS if width < 8], unpack)

    return vectors.function(f"unpack_{path}", emit, types.none, [INT] * 7, "alwaysinline")


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
