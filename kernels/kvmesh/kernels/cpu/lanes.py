"""Arithmetic on rows of a tile, emitted eight lanes at a time.

Written as LLVM IR, because a loop that LLVM does not turn into vectors costs more here than the dot
products. Nothing is fused and each sum has one order, so every instruction set finds the same bits.
Addresses and sizes are int64; rows have 64 elements where no size is given.
"""

import inspect
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic

from kvmesh.kernels.cpu import simd
from kvmesh.kernels.layout import BLOCK_SIZE

cgutils: Any = untyped_cgutils

WIDTH = 8
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves an integer in the low bits
_ROUND_BITS = 0x4B400000
_LOWEST = -100.0  # of an exponent: its power times an fp16 scale is still a normal fp32
# 2^x for |x| <= 1/2, relative error 9e-8: least largest error, by iterated weighted least squares.
_POWERS = (
    0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253,
    0.6931470036506653, 1.0,
)  # fmt: skip
_SMALLEST = 2.0**-100  # a row of weights without a larger one is zeros
_FROM_HALF = 2.0**112


class _Emitter:
    """Vectors of `width` lanes, or scalars if that is 1, in a function of the module."""

    def __init__(self, builder: Any, width: int = WIDTH) -> None:
        self.b, self.width = builder, width

    def kind(self, scalar: Any) -> Any:
        return scalar if self.width == 1 else ir.VectorType(scalar, self.width)

    def number(self, scalar: Any, value: Any) -> Any:
        one = scalar(value)
        return one if self.width == 1 else ir.Constant(self.kind(scalar), [one] * self.width)

    def real(self, value: float) -> Any:
        return self.number(_FLOAT, value)

    def integer(self, value: int) -> Any:
        return self.number(_I32, value)

    def spread(self, scalar: Any) -> Any:
        return simd.splat(self.b, scalar, self.width)

    def place(self, scalar: Any, address: Any, index: Any, width: int | None = None) -> Any:
        at = self.b.gep(self.b.inttoptr(address, scalar.as_pointer()), [index])
        kind = ir.VectorType(scalar, width or self.width)
        return self.b.bitcast(at, kind.as_pointer())

    def load(self, scalar: Any, address: Any, index: Any) -> Any:
        return self.b.load(self.place(scalar, address, index), align=2 if scalar is _I16 else 4)

    def store(self, scalar: Any, value: Any, address: Any, index: Any) -> None:
        self.b.store(value, self.place(scalar, address, index), align=4)

    def larger(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def absolute(self, x: Any) -> Any:
        bits = self.b.and_(self.b.bitcast(x, self.kind(_I32)), self.integer(0x7FFFFFFF))
        return self.b.bitcast(bits, self.kind(_FLOAT))

    def halves(self, x: Any, width: int) -> tuple[Any, Any]:
        half = width // 2
        first, last = (
            self.b.shuffle_vector(
                x, x, ir.Constant(ir.VectorType(_I32, half), list(range(at, at + half)))
            )
            for at in (0, half)
        )
        return first, last

    def reduce(self, rows: list[Any], add: Any) -> Any:
        """One scalar of vectors (a power of two), by halves: the first joins the one half on."""
        while len(rows) > 1:
            half = len(rows) // 2
            rows = [add(x, y) for x, y in zip(rows[:half], rows[half:], strict=True)]
        total, width = rows[0], self.width
        while width > 1:
            total = add(*self.halves(total, width))
            width //= 2
        return self.b.extract_element(total, _I32(0))

    def centered(self, dots: Any, offset: Any) -> Any:
        """2 dots - offset as fp32, exactly what simd.py's sums stand for."""
        whole = self.b.sub(self.b.shl(dots, self.integer(1)), offset)
        return self.b.sitofp(whole, self.kind(_FLOAT))

    def exp2(self, values: list[Any]) -> list[Any]:
        """2^x of fp32 x <= 0, within 2 ulp; below -100 as at -100.

        Step by step for all of them: the chain of operations of one is too long for a processor to
        look past its end.
        """
        b, magic = self.b, self.real(_ROUND)
        values = [self.larger(x, self.real(_LOWEST)) for x in values]
        shifted = [b.fadd(x, magic) for x in values]
        whole = [b.fsub(x, magic) for x in shifted]
        rest = [b.fsub(x, n) for x, n in zip(values, whole, strict=True)]
        powers = [self.real(_POWERS[0])] * len(rest)
        for factor in _POWERS[1:]:
            powers = [b.fmul(p, r) for p, r in zip(powers, rest, strict=True)]
            powers = [b.fadd(p, self.real(factor)) for p in powers]
        exponents = [b.shl(b.bitcast(x, self.kind(_I32)), self.integer(23)) for x in shifted]
        return [
            b.bitcast(b.add(b.bitcast(p, self.kind(_I32)), n), self.kind(_FLOAT))
            for p, n in zip(powers, exponents, strict=True)
        ]


def _tile_rows() -> list[Any]:
    return [_I64(at) for at in range(0, BLOCK_SIZE, WIDTH)]


def _widen(b: Any, halves: Any, out: Any) -> None:
    at = _Emitter(b)
    for i in _tile_rows():
        bits = b.shl(b.zext(at.load(_I16, halves, i), at.kind(_I32)), at.integer(13))
        value = b.fmul(b.bitcast(bits, at.kind(_FLOAT)), at.real(_FROM_HALF))
        at.store(_FLOAT, value, out, i)


def _scale(b: Any, dots: Any, scales: Any, out: Any, unit: Any, offset: Any, bias: Any) -> None:
    at = _Emitter(b)
    unit, offset, bias = at.spread(unit), at.spread(offset), at.spread(bias)
    for i in _tile_rows():
        dot = at.centered(at.load(_I32, dots, i), offset)
        score = b.fmul(b.fmul(dot, unit), at.load(_FLOAT, scales, i))
        at.store(_FLOAT, b.fadd(bias, score), out, i)


def _largest(b: Any, scores: Any, before: Any) -> Any:
    at = _Emitter(b)
    top = at.reduce([at.load(_FLOAT, scores, i) for i in _tile_rows()], at.larger)
    return at.larger(top, before)


def _exponents(b: Any, scores: Any, peak: Any) -> Any:
    at = _Emitter(b)
    top = at.spread(peak)
    weights: list[Any] = []
    rows = _tile_rows()
    for some in (rows[:4], rows[4:]):
        weights += at.exp2([b.fsub(at.load(_FLOAT, scores, i), top) for i in some])
        for i, weight in zip(some, weights[-4:], strict=True):
            at.store(_FLOAT, weight, scores, i)
    return at.reduce(weights, b.fadd)


def _accumulate(
    b: Any, dots: Any, mixed: Any, size: Any, unit: Any, offset: Any, fade: Any
) -> None:
    at = _Emitter(b)
    unit, offset, fade = at.spread(unit), at.spread(offset), at.spread(fade)
    with cgutils.for_range(b, b.udiv(size, _I64(WIDTH))) as loop:
        i = b.mul(loop.index, _I64(WIDTH))
        more = b.fmul(at.centered(at.load(_I32, dots, i), offset), unit)
        before = b.fmul(at.load(_FLOAT, mixed, i), fade)
        at.store(_FLOAT, b.fadd(before, more), mixed, i)


def _round(
    b: Any, x: Any, size: Any, wide: Any, high: Any, low: Any, unit: Any, offset: Any
) -> None:
    at = _Emitter(b)
    steps = b.udiv(size, _I64(WIDTH))
    top = cgutils.alloca_once_value(b, at.real(0.0))
    with cgutils.for_range(b, steps) as loop:
        value = at.load(_FLOAT, x, b.mul(loop.index, _I64(WIDTH)))
        b.store(at.larger(at.absolute(value), b.load(top)), top)
    factor = _set_unit(at, b.load(top), unit)
    total = cgutils.alloca_once_value(b, at.integer(0))
    with cgutils.for_range(b, steps) as loop:
        i = b.mul(loop.index, _I64(WIDTH))
        whole = _set_whole(at, b.fmul(at.load(_FLOAT, x, i), factor), (wide, high, low), i)
        b.store(b.add(b.load(total), whole), total)
    _store_one(b, _I32, b.mul(at.reduce([b.load(total)], b.add), _I32(255)), offset)


def _round_tile(
    b: Any, x: Any, scales: Any, wide: Any, high: Any, low: Any, unit: Any, offset: Any
) -> None:
    at = _Emitter(b)
    rows = _tile_rows()
    values = [b.fmul(at.load(_FLOAT, x, i), at.load(_FLOAT, scales, i)) for i in rows]
    tops = [at.absolute(value) for value in values]
    while len(tops) > 1:
        tops = [at.larger(a, c) for a, c in zip(tops[::2], tops[1::2], strict=True)]
    factor = _set_unit(at, tops[0], unit)
    moved = [b.fmul(value, factor) for value in values]
    wholes = [
        _set_whole(at, value, (wide, high, low), i) for value, i in zip(moved, rows, strict=True)
    ]
    _store_one(b, _I32, b.mul(at.reduce(wholes, b.add), _I32(255)), offset)


def _set_unit(at: _Emitter, tops: Any, unit: Any) -> Any:
    """Writes what a weight of one stands for; returns what to multiply by, in every lane."""
    b = at.b
    most = at.reduce([tops], at.larger)
    some = b.fcmp_ordered(">", most, _FLOAT(_SMALLEST))
    scale = b.select(some, b.fdiv(_FLOAT(float(simd.LARGEST)), most), _FLOAT(0.0))
    _store_one(b, _FLOAT, b.fmul(most, _FLOAT(1 / simd.LARGEST)), unit)
    return at.spread(scale)


def _set_whole(at: _Emitter, value: Any, outs: tuple[Any, Any, Any], i: Any) -> Any:
    """Writes the nearest integers of one vector, and returns them."""
    b = at.b
    moved = b.bitcast(b.fadd(value, at.real(_ROUND)), at.kind(_I32))
    whole = b.sub(moved, at.integer(_ROUND_BITS))
    order = [n // 4 * 4 + simd.ORDER[n % 4] for n in range(WIDTH)]
    short = b.trunc(whole, at.kind(_I16))
    short = b.shuffle_vector(short, short, ir.Constant(ir.VectorType(_I32, WIDTH), order))
    b.store(short, at.place(_I16, outs[0], i), align=2)
    if simd.PATHS[simd.CHOSEN].split:
        upper = b.ashr(b.add(whole, at.integer(128)), at.integer(8))
        lower = b.sub(whole, b.shl(upper, at.integer(8)))
        for part, out in zip((upper, lower), outs[1:], strict=True):
            b.store(b.trunc(part, at.kind(_I8)), at.place(_I8, out, i), align=1)
    return whole


def _store_one(b: Any, kind: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, kind.as_pointer()))


_INT, _REAL = types.int64, types.float32
_LLVM = {_INT: _I64, _REAL: _FLOAT, types.int32: _I32, types.none: ir.VoidType()}


def _function(
    name: str, emit: Any, result: Any, arguments: list[Any], inlining: str = "noinline"
) -> Any:
    """A Numba function made of `emit(builder, *arguments)`: compiled once a module."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        symbol = f"kvmesh_lanes_{name}"
        function = builder.module.globals.get(symbol)
        if function is None:
            kind = ir.FunctionType(_LLVM[result], [_LLVM[x] for x in arguments])
            function = ir.Function(builder.module, kind, symbol)
            function.linkage = "linkonce_odr"
            function.attributes.add(inlining)
            inner = ir.IRBuilder(function.append_basic_block())
            found = emit(inner, *function.args)
            if found is None:
                inner.ret_void()
            else:
                inner.ret(found)
        call = builder.call(function, values)
        return context.get_dummy_value() if result is types.none else call

    def typed(typing_context: Any, *given: Any) -> Any:
        return result(*arguments), generate

    own = list(inspect.signature(emit).parameters.values())[1:]
    first = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    typed.__name__, typed.__signature__ = name, inspect.Signature([first, *own])  # type: ignore[attr-defined]
    return intrinsic(typed)


# (address of fp16 bits, none of them negative; of fp32, written)
widen_halves = _function("widen_halves", _widen, types.none, [_INT] * 2)
# scores = bias + scale * unit * (2 dots - offset): (dots, scales, scores, unit, offset, bias)
scale_dots = _function(
    "scale_dots", _scale, types.none, [_INT] * 3 + [_REAL, types.int32, _REAL]
)  # fmt: skip
# (scores, a score) -> the largest of all
largest = _function("largest", _largest, _REAL, [_INT, _REAL])
# Scores become 2^(score - peak): (scores, peak) -> their sum, added up by halves
exponents = _function("exponents", _exponents, _REAL, [_INT, _REAL])
# fp32 x of a size that is a multiple of eight, to one row of dot.py's Weights
round_row = _function("round_row", _round, types.none, [_INT] * 7)
# The same of x * scales, 64 of them
round_tile = _function("round_tile", _round_tile, types.none, [_INT] * 7)
# mixed = mixed * fade + unit * (2 dots - offset): (dots, mixed, size, unit, offset, fade)
accumulate = _function(
    "accumulate", _accumulate, types.none, [_INT] * 3 + [_REAL, types.int32, _REAL]
)  # fmt: skip


def _exp2(typing_context: Any, x: Any) -> Any:
    """2^x of one fp32 x <= 0, the same as `exponents` finds."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _Emitter(builder, 1).exp2(values)[0]

    return _REAL(_REAL), generate


exp2: Any = intrinsic(_exp2)


def _element(kind: Any, address: Any, index: Any, b: Any) -> Any:
    return b.gep(b.inttoptr(address, kind.as_pointer()), [index])


def _get(b: Any, address: Any, index: Any) -> Any:
    return b.load(_element(_FLOAT, address, index, b))


def _get_int(b: Any, address: Any, index: Any) -> Any:
    return b.load(_element(_I32, address, index, b))


def _put(b: Any, address: Any, index: Any, value: Any) -> None:
    b.store(value, _element(_FLOAT, address, index, b))


def _fetch_row(b: Any, address: Any) -> None:
    for line in range(0, 2 * BLOCK_SIZE, 64):
        simd.prefetch(b, b.add(address, _I64(line)))


# Brings a row of fp16 at an address into the cache.
fetch_halves = _function("fetch_halves", _fetch_row, types.none, [_INT], "alwaysinline")
# One fp32 or int32 of the array at an address.
get = _function("get", _get, _REAL, [_INT] * 2, "alwaysinline")
get_int = _function("get_int", _get_int, types.int32, [_INT] * 2, "alwaysinline")
put = _function("put", _put, types.none, [_INT] * 2 + [_REAL], "alwaysinline")
