"""Functions of vectors, emitted as LLVM IR.

A loop that LLVM does not turn into vectors costs more here than the dot products. A product is
rounded before it is added but where `fused` says so, and each sum has one order: so every
instruction set finds the same bits. Addresses and sizes are
int64.
"""

import inspect
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvmesh.kernels.cpu import simd

WIDTH = 8
WIDE = simd.PATHS[simd.CHOSEN].lanes  # where the sums are the same with vectors of any size
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves an integer in the low bits
ROUND_BITS = 0x4B400000
_FROM_HALF = 2.0**112
_LOWEST = -100.0  # of an exponent: its power times an fp16 scale is still a normal fp32
# 2^x for |x| <= 1/2, relative error 9e-8: least largest error, by iterated weighted least squares.
_POWERS = (
    0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253,
    0.6931470036506653, 1.0,
)  # fmt: skip


class Emitter:
    """Vectors of `width` lanes, or scalars if that is 1, in a function of the module."""

    def __init__(self, builder: Any, width: int = WIDTH) -> None:
        self.b, self.width = builder, width

    def kind(self, scalar: Any) -> Any:
        return scalar if self.width == 1 else ir.VectorType(scalar, self.width)

    def number(self, scalar: Any, value: Any) -> Any:
        one = scalar(value)
        return one if self.width == 1 else ir.Constant(self.kind(scalar), [one] * self.width)

    def real(self, value: float) -> Any:
        return self.number(FLOAT, value)

    def integer(self, value: int) -> Any:
        return self.number(I32, value)

    def spread(self, scalar: Any) -> Any:
        return simd.splat(self.b, scalar, self.width)

    def place(self, scalar: Any, address: Any, index: Any) -> Any:
        at = _element(self.b, scalar, address, index)
        return self.b.bitcast(at, self.kind(scalar).as_pointer())

    def load(self, scalar: Any, address: Any, index: Any) -> Any:
        return self.b.load(self.place(scalar, address, index), align=2 if scalar is I16 else 4)

    def load_halves(self, address: Any, index: Any) -> Any:
        """fp32 of fp16 that are not negative, exactly."""
        bits = self.b.zext(self.load(I16, address, index), self.kind(I32))
        bits = self.b.bitcast(self.b.shl(bits, self.integer(13)), self.kind(FLOAT))
        return self.b.fmul(bits, self.real(_FROM_HALF))

    def store(self, scalar: Any, value: Any, address: Any, index: Any) -> None:
        self.b.store(value, self.place(scalar, address, index), align=4)

    def fused(self, x: Any, y: Any, z: Any) -> Any:
        """x * y + z, rounded once; where a processor cannot, LLVM calls a function that does."""
        kind = self.kind(FLOAT)
        name = "llvm.fma.f32" if self.width == 1 else f"llvm.fma.v{self.width}f32"
        call = simd.declared(self.b, name, ir.FunctionType(kind, [kind] * 3))
        return self.b.call(call, [x, y, z])

    def larger(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def absolute(self, x: Any) -> Any:
        bits = self.b.and_(self.b.bitcast(x, self.kind(I32)), self.integer(0x7FFFFFFF))
        return self.b.bitcast(bits, self.kind(FLOAT))

    def halves(self, x: Any, width: int) -> tuple[Any, Any]:
        half = width // 2
        first, last = (simd.shuffle(self.b, x, x, list(range(at, at + half))) for at in (0, half))
        return first, last

    def fold(self, rows: list[Any], add: Any) -> Any:
        """One of vectors (a power of two), by halves: the first joins the one half on."""
        while len(rows) > 1:
            half = len(rows) // 2
            rows = [add(x, y) for x, y in zip(rows[:half], rows[half:], strict=True)]
        return rows[0]

    def reduce(self, rows: list[Any], add: Any) -> Any:
        """One scalar of vectors (a power of two), likewise; then of its lanes."""
        total, width = self.fold(rows, add), self.width
        while width > 1:
            total = add(*self.halves(total, width))
            width //= 2
        return self.b.extract_element(total, I32(0))

    def centered(self, dots: Any, offset: Any) -> Any:
        """2 dots - offset as fp32, exactly what simd.py's sums stand for."""
        whole = self.b.sub(self.b.shl(dots, self.integer(1)), offset)
        return self.b.sitofp(whole, self.kind(FLOAT))

    def exp2(self, values: list[Any]) -> list[Any]:
        """2^x of fp32 x <= 0, within 2 ulp; below -100 as at -100.

        Step by step for all of them: the chain of operations of one is too long for a processor to
        look past its end.
        """
        b, magic = self.b, self.real(ROUND)
        values = [self.larger(x, self.real(_LOWEST)) for x in values]
        shifted = [b.fadd(x, magic) for x in values]
        whole = [b.fsub(x, magic) for x in shifted]
        rest = [b.fsub(x, n) for x, n in zip(values, whole, strict=True)]
        powers = [self.real(_POWERS[0])] * len(rest)
        for factor in _POWERS[1:]:
            term = self.real(factor)
            powers = [self.fused(p, r, term) for p, r in zip(powers, rest, strict=True)]
        exponents = [b.shl(b.bitcast(x, self.kind(I32)), self.integer(23)) for x in shifted]
        return [
            b.bitcast(b.add(b.bitcast(p, self.kind(I32)), n), self.kind(FLOAT))
            for p, n in zip(powers, exponents, strict=True)
        ]


INT, REAL = types.int64, types.float32
_LLVM = {INT: I64, REAL: FLOAT, types.int32: I32, types.none: ir.VoidType()}


def function(
    name: str, emit: Any, result: Any, arguments: list[Any], inlining: str = "noinline"
) -> Any:
    """A Numba function made of `emit(builder, *arguments)`: compiled once a module."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        symbol = f"kvmesh_lanes_{name}"
        call = simd.called(builder, symbol, emit, _LLVM[result], values, inlining)
        return context.get_dummy_value() if result is types.none else call

    def typed(typing_context: Any, *given: Any) -> Any:
        return result(*arguments), generate

    own = list(inspect.signature(emit).parameters.values())[1:]
    first = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    typed.__name__, typed.__signature__ = name, inspect.Signature([first, *own])  # type: ignore[attr-defined]
    return intrinsic(typed)


def _exp2(typing_context: Any, x: Any) -> Any:
    """2^x of one fp32 x <= 0, the same as `exponents` finds."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return Emitter(builder, 1).exp2(values)[0]

    return REAL(REAL), generate


exp2: Any = intrinsic(_exp2)


def _element(b: Any, kind: Any, address: Any, index: Any) -> Any:
    """Where the element at an index of the array at an address is."""
    return b.gep(b.inttoptr(address, kind.as_pointer()), [index])


def _get(b: Any, address: Any, index: Any) -> Any:
    return b.load(_element(b, FLOAT, address, index))


def _take_one(b: Any, address: Any, index: Any) -> Any:
    return b.atomic_rmw("add", _element(b, I64, address, index), I64(1), "acq_rel")


def _put(b: Any, address: Any, index: Any, value: Any) -> None:
    b.store(value, _element(b, FLOAT, address, index))


# One fp32 of the array at an address.
get = function("get", _get, REAL, [INT] * 2, "alwaysinline")
put = function("put", _put, types.none, [INT] * 2 + [REAL], "alwaysinline")
# Adds one to an int64 that threads share; returns what it was. What was written before is seen by
# whoever takes after.
take_one = function("take_one", _take_one, INT, [INT] * 2, "alwaysinline")
