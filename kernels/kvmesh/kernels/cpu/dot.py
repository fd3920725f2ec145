"""The loop around simd.py's primitives: out[r, lane] of all lanes of one head's plane."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils

from kvmesh.kernels import codebook
from kvmesh.kernels.cpu import simd, vectors
from kvmesh.kernels.cpu.jit import kernel
from kvmesh.kernels.cpu.lanes import round_row
from kvmesh.kernels.cpu.vectors import INT

cgutils: Any = untyped_cgutils

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
WIDTHS = (2, 3, 4, 8)
LANES = 16  # what any number of lanes is a multiple of


class Loop:
    """Emits the body of one function: the codes' width, rows and the instruction set are fixed."""

    name = "dot"

    def __init__(self, path: simd.Portable, bits: int, rows: int, function: Any) -> None:
        codes, wide, high, low, out, self.length, self.lanes, self.o_stride, *self.ahead = (
            function.args
        )
        self.path, self.bits, self.rows = path, bits, rows
        self.b = ir.IRBuilder(function.append_basic_block())
        self.codes, self.wide = self._pointer(codes, _I8), self._pointer(wide, _I16)
        self.high, self.low = self._pointer(high, _I8), self._pointer(low, _I8)
        self.out = self._pointer(out, _I32)
        self.vector = ir.VectorType(_I32, path.lanes)
        self.width = 2 if bits == 3 else bits
        self.fields = 8 // self.width
        self.grid: list[int] = []
        if bits < 8:
            self.grid = ([*map(int, codebook.grid(bits))] * 16)[:16]

    def _pointer(self, address: Any, kind: Any) -> Any:
        return self.b.inttoptr(address, kind.as_pointer())

    def _load(self, offset: Any) -> Any:
        at = self.b.bitcast(self.b.gep(self.codes, [offset]), self.vector.as_pointer())
        return self.b.load(at, align=4)

    def _constant(self, value: int) -> Any:
        return ir.Constant(self.vector, [_I32(value)] * self.path.lanes)

    def _field(self, word: Any, shift: int, mask: int) -> Any:
        """Bits of every byte, moved down by shift, to be looked up."""
        if shift:
            word = self.b.lshr(word, self._constant(shift))
        return self._only(word, mask) if self.path.strict else word

    def _only(self, word: Any, mask: int) -> Any:
        return self.b.and_(word, self._constant(mask * 0x01010101))

    def _lookup(self, table: list[int], index: Any) -> Any:
        octets = ir.VectorType(_I8, 4 * self.path.lanes)
        constant = ir.Constant(ir.VectorType(_I8, 16), [_I8(x) for x in table])
        return self.path.lookup(self.b, constant, self.b.bitcast(index, octets))

    def _octets(self, word: Any, signs: Any) -> Iterator[tuple[int, Any]]:
        """Fields of a word: the number of each, and u of its four elements in each lane.

        A lookup takes the low four bits of an index and minds at most that the highest is clear. So
        two fields of 2 bits share one mask, and of 3 bits one more lookup, which spreads the signs.
        """
        if self.bits == 8:
            yield 0, self.b.bitcast(word, ir.VectorType(_I8, 4 * self.path.lanes))
        elif self.bits == 4:
            for k in (0, 1):
                yield k, self._lookup(self.grid, self._field(word, 4 * k, 0x0F))
        else:
            for k in (0, 1):
                pair = self._field(word, 2 * k, 0x33)
                if signs is not None:
                    spread = [(i >> k & 1) << 2 | (i >> k & 4) << 4 for i in range(16)]
                    found = self._lookup(spread, signs)
                    pair = self._only(pair, 0x33)
                    pair = self.b.or_(pair, self.b.bitcast(found, self.vector))
                yield k, self._lookup(self.grid, pair)
                yield k + 2, self._lookup(self.grid, self.b.lshr(pair, self._constant(4)))

    def _signs(self, pair: Any, firsts: list[Any]) -> list[Any]:
        """The signs of two rows of words (3 bits), those of the first in the low half of each byte;
        also asks for those of the planes ahead."""
        b, four = self.b, _I64(4)
        border = b.udiv(b.mul(self.length, self.lanes), four)
        start = b.add(border, b.mul(b.mul(pair, self.lanes), four))
        places = [b.add(start, b.mul(first, four)) for first in firsts]
        self._prefetch(places)
        return [self._load(at) for at in places]

    def _prefetch(self, places: list[Any]) -> None:
        """Asks for the lines of the planes ahead that lie where these words do."""
        for at in places[:: LANES // self.path.lanes]:
            for plane, level in zip(self.ahead, self.path.levels, strict=False):
                simd.prefetch(self.b, self.b.add(plane, at), level)

    def _all_words(self, firsts: list[Any], sums: list[list[list[Any]]]) -> None:
        """firsts: each group's first lane; sums: allocas, by group, row."""
        b, nothing = self.b, [None] * len(firsts)
        words = b.udiv(self.length, _I64(4 * self.fields))
        if self.bits != 3:
            with cgutils.for_range(b, words) as word:
                self._row_of_words(word.index, firsts, nothing, sums)
            return
        with cgutils.for_range(b, b.lshr(words, _I64(1))) as pair:
            signs = self._signs(pair.index, firsts)
            number = b.shl(pair.index, _I64(1))
            self._row_of_words(number, firsts, [self._field(x, 0, 0x0F) for x in signs], sums)
            number, signs = b.add(number, _I64(1)), [self._field(x, 4, 0x0F) for x in signs]
            self._row_of_words(number, firsts, signs, sums)
        with b.if_then(b.trunc(words, ir.IntType(1))):
            number = b.sub(words, _I64(1))
            signs = self._signs(b.lshr(number, _I64(1)), firsts)
            self._row_of_words(number, firsts, [self._field(x, 0, 0x0F) for x in signs], sums)

    def _row_of_words(
        self, number: Any, firsts: list[Any], signs: list[Any], sums: list[list[list[Any]]]
    ) -> None:
        """Adds one row of words. firsts and sums as in `_all_words`; signs: of each group, for 3
        bits."""
        b, path = self.b, self.path
        places = [b.mul(b.add(b.mul(number, self.lanes), x), _I64(4)) for x in firsts]
        words = [self._load(at) for at in places]
        self._prefetch(places)
        by_group = (self._octets(*both) for both in zip(words, signs, strict=True))
        for fields in zip(*by_group, strict=True):
            k, octets = fields[0][0], [x for _, x in fields]
            element = b.add(b.mul(number, _I64(4 * self.fields)), _I64(4 * k))
            for half in range(path.halves):
                parts = [path.half(b, x, half) for x in octets]
                for r in range(self.rows):
                    place = b.add(element, b.mul(self.length, _I64(r)))
                    weights = path.weights(b, self.wide, (self.high, self.low), place, half)
                    for own, part in zip(sums, parts, strict=True):
                        before = [b.load(x) for x in own[r]]
                        after = path.add(b, before, part, weights)
                        for x, value in zip(own[r], after, strict=True):
                            b.store(value, x)

    def emit(self) -> None:
        """Some groups of lanes after others, then those that are left, one by one."""
        b, width = self.b, self.path.groups * self.path.lanes
        whole = b.mul(b.udiv(self.lanes, _I64(width)), _I64(width))
        self._passes(_I64(0), whole, self.path.groups)
        if width > LANES:
            self._passes(whole, self.lanes, 1)
        b.ret_void()

    def _passes(self, start: Any, end: Any, groups: int) -> None:
        """Passes over all words, each for the lanes of some groups: the sums stay in registers."""
        b, path = self.b, self.path
        width = groups * path.lanes
        sums = [
            [
                [cgutils.alloca_once(b, self.vector) for _ in range(path.sums)]
                for _ in range(self.rows)
            ]
            for _ in range(groups)
        ]
        with cgutils.for_range(b, b.udiv(b.sub(end, start), _I64(width))) as step:
            first = b.add(start, b.mul(step.index, _I64(width)))
            firsts = [b.add(first, _I64(path.lanes * i)) for i in range(groups)]
            for x in (x for group in sums for row in group for x in row):
                b.store(self._constant(0), x)
            self._all_words(firsts, sums)
            for group, first in zip(sums, firsts, strict=True):
                for r, row in enumerate(group):
                    total = path.total(b, [b.load(x) for x in row])
                    at = b.add(first, b.mul(self.o_stride, _I64(r)))
                    place = b.bitcast(b.gep(self.out, [at]), self.vector.as_pointer())
                    b.store(total, place, align=4)


def loop_function(
    module: Any, path: simd.Portable, bits: int, rows: int, loop: type[Loop] = Loop
) -> Any:
    """A module's function for one width and number of rows: compiled once, never inlined.

    Its arguments, int64: addresses of codes, weights, high and low bytes, out; length, lanes,
    elements between rows of out; addresses of the planes that are read next, and then.
    """
    name = f"kvmesh_{loop.name}_{path.name}_{bits}_{rows}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * 10), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    loop(path, bits, rows, function).emit()
    return function


def _emit_rows(builder: Any, path: simd.Portable, bits: int, arguments: Any) -> None:
    """Calls the largest function that the rows left have work for, until none is left."""
    codes, wide, high, low, out, count, length, lanes, stride, *ahead = arguments
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
        function = loop_function(builder.module, path, bits, rows)
        builder.call(function, [codes, *places, length, lanes, stride, *ahead])
        builder.store(builder.add(at, _I64(rows)), done)
        builder.branch(loop)
        builder.position_at_end(after)


def for_width(builder: Any, bits: Any, widths: Sequence[int], emit: Callable[[int], None]) -> None:
    """Emits what is to be done for the one of these widths that bits is; nothing for another."""
    after = builder.append_basic_block()
    switch = builder.switch(bits, after)
    for width in widths:
        block = builder.append_basic_block()
        switch.add_case(_I64(width), block)
        builder.position_at_end(block)
        emit(width)
        builder.branch(after)
    builder.position_at_end(after)


def make_dot(path: str) -> Any:
    """A Numba function of addresses and sizes (int64), see simd.py for what it computes.

    (bits, codes, weights i16, their high bytes, their low bytes, out i32, count of rows, length,
    lanes, elements between rows of out, addresses of the planes that are read next, and
    then, which come into the caches meanwhile); writes count * lanes of out.
    """

    def emit(
        b: Any, bits: Any, codes: Any, wide: Any, high: Any, low: Any, out: Any, count: Any,
        length: Any, lanes: Any, stride: Any, following: Any, later: Any,
    ) -> None:  # fmt: skip
        rest = codes, wide, high, low, out, count, length, lanes, stride, following, later
        for_width(b, bits, WIDTHS, lambda width: _emit_rows(b, simd.PATHS[path], width, rest))

    return vectors.function(f"dot_{path}", emit, types.none, [INT] * 12, "alwaysinline")


_dot = make_dot(simd.CHOSEN)


class Weights(NamedTuple):
    """Where rows of 16-bit weights lie: round(x * LARGEST / largest |x| of the row). Addresses."""

    wide: Any  # int16 [rows, length], each four in the order of simd.ORDER
    high: Any  # int8 [rows, length], wide = 256 high + low; only where the path splits weights
    low: Any  # int8 [rows, length]
    unit: Any  # fp32 [rows], what a weight of one stands for
    offset: Any  # int32 [rows], 255 times the row's sum
    length: Any  # int64


@kernel
def set_weights(weights: Any, row: int, x: int) -> None:
    """Rounds fp32 [length] at an address, length a multiple of 8, into a row."""
    first = row * weights.length
    round_row(
        x, weights.length, weights.wide + 2 * first, weights.high + first, weights.low + first,
        weights.unit + 4 * row, weights.offset + 4 * row,
    )  # fmt: skip


@kernel
def dot_rows(
    bits: int, planes: Any, weights: Any, rows: Any, out: int, lanes: int, stride: int
) -> None:
    """out[r] = the dot products of `rows` (first, count) of weights.

    planes: addresses of one head's plane, and of the two that are read next; out: of int32
    [count, stride], stride at least lanes.
    """
    codes, following, later = planes
    first, count = rows
    at = first * weights.length
    _dot(
        bits, codes, weights.wide + 2 * at, weights.high + at, weights.low + at, out, count,
        weights.length, lanes, stride, following, later,
    )  # fmt: skip
