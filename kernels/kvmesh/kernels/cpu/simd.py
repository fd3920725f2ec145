"""Integer dot products of sealed codes, for each instruction set: one kernel for K and for V.

    out[r, lane] = sum over e < length of u(code[e, lane]) * weights[r, e]     in wrapping int32

u is the code's byte on the grid of codebook.py, weights are 16-bit integers, at most LARGEST in
size, so that they split into 256 high + low with signed bytes. 2 out - 255 sum(weights) is then the
sum over (2 u - 255) * weights, exact for length <= 256, and the same on every instruction set.
Lanes are tokens for scores and dims for outputs (block.py); no sum crosses lanes inside the loop.
"""

import os
from typing import Any

from llvmlite import binding, ir

LARGEST = 127 * 256 + 127  # of a weight: 256 * 255 * LARGEST < 2^31
ROWS = 4  # weights that share one pass over the codes; accumulators stay in registers

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _splat(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), order))


class Portable:
    """Generic vector IR: LLVM makes of it what the CPU has."""

    name = "portable"
    lanes = 8
    sums = 1  # accumulators of each row

    def lookup(self, builder: Any, table: Any, index: Any) -> Any:
        """The table's byte for each byte of index, all below 16."""
        out = ir.Constant(index.type, ir.Undefined)
        for i in range(4 * self.lanes):
            at = builder.zext(builder.extract_element(index, _I32(i)), _I32)
            out = builder.insert_element(out, builder.extract_element(table, at), _I32(i))
        return out

    def widen(self, builder: Any, octets: Any) -> Any:
        return builder.zext(octets, ir.VectorType(_I32, 4 * self.lanes))

    def weights(self, builder: Any, wide: Any, high_low: Any, at: Any) -> Any:
        """Four weights for each lane. wide: i16*; high_low: (i8*, i8*); at: index of the first."""
        four = builder.load(
            builder.bitcast(builder.gep(wide, [at]), ir.VectorType(_I16, 4).as_pointer()), align=2
        )
        four = builder.sext(four, ir.VectorType(_I32, 4))
        return _shuffle(builder, four, four, [i % 4 for i in range(4 * self.lanes)])

    def add(self, builder: Any, sums: list[Any], octets: Any, weights: Any) -> list[Any]:
        product = builder.mul(octets, weights)
        for i in range(4):
            part = _shuffle(builder, product, product, list(range(i, 4 * self.lanes, 4)))
            sums = [builder.add(sums[0], part)]
        return sums

    def total(self, builder: Any, sums: list[Any]) -> Any:
        return sums[0]


class Avx2(Portable):
    """vpshufb and vpmaddwd on 16-bit integers: two sums of two elements for each token."""

    name = "avx2"
    sums = 2

    def lookup(self, builder: Any, table: Any, index: Any) -> Any:
        kind = ir.VectorType(_I8, 32)
        call = ir.FunctionType(kind, [kind, kind])
        both = _shuffle(builder, table, table, [i % 16 for i in range(32)])
        name = "llvm.x86.avx2.pshuf.b"
        return builder.call(_declare(builder, name, call), [both, index])

    def widen(self, builder: Any, octets: Any) -> Any:
        zero = ir.Constant(octets.type, [0] * 32)
        halves = []
        for start in (0, 8):
            order = [(lane + start + i // 2) + 32 * (i % 2) for lane in (0, 16) for i in range(16)]
            spread = _shuffle(builder, octets, zero, order)
            halves.append(builder.bitcast(spread, ir.VectorType(_I16, 16)))
        return halves

    def weights(self, builder: Any, wide: Any, high_low: Any, at: Any) -> Any:
        four = builder.load(builder.bitcast(builder.gep(wide, [at]), _I64.as_pointer()), align=2)
        return builder.bitcast(_splat(builder, four, 4), ir.VectorType(_I16, 16))

    def add(self, builder: Any, sums: list[Any], octets: Any, weights: Any) -> list[Any]:
        kind, half = ir.VectorType(_I32, 8), ir.VectorType(_I16, 16)
        madd = _declare(builder, "llvm.x86.avx2.pmadd.wd", ir.FunctionType(kind, [half, half]))
        return [
            builder.add(total, builder.call(madd, [part, weights]))
            for total, part in zip(sums, octets, strict=True)
        ]

    def total(self, builder: Any, sums: list[Any]) -> Any:
        even = _shuffle(builder, *sums, [0, 2, 8, 10, 4, 6, 12, 14])
        odd = _shuffle(builder, *sums, [1, 3, 9, 11, 5, 7, 13, 15])
        return builder.add(even, odd)


class Avx512(Portable):
    """vpshufb and vpdpbusd, which adds four products of bytes in each lane."""

    name = "avx512"
    lanes = 16
    sums = 2  # of the high and of the low bytes

    def lookup(self, builder: Any, table: Any, index: Any) -> Any:
        kind = ir.VectorType(_I8, 64)
        all_four = _shuffle(builder, table, table, [i % 16 for i in range(64)])
        shuffle = _declare(
            builder, "llvm.x86.avx512.pshuf.b.512", ir.FunctionType(kind, [kind, kind])
        )
        return builder.call(shuffle, [all_four, index])

    def widen(self, builder: Any, octets: Any) -> Any:
        return builder.bitcast(octets, ir.VectorType(_I32, 16))

    def weights(self, builder: Any, wide: Any, high_low: Any, at: Any) -> Any:
        four = _I32.as_pointer()
        return [
            _splat(builder, builder.load(builder.bitcast(builder.gep(x, [at]), four), align=1), 16)
            for x in high_low
        ]

    def dot(self, builder: Any, total: Any, octets: Any, weights: Any) -> Any:
        kind = ir.VectorType(_I32, 16)
        name = "llvm.x86.avx512.vpdpbusd.512"
        call = _declare(builder, name, ir.FunctionType(kind, [kind, kind, kind]))
        return builder.call(call, [total, octets, weights])

    def add(self, builder: Any, sums: list[Any], octets: Any, weights: Any) -> list[Any]:
        return [
            self.dot(builder, total, octets, part)
            for total, part in zip(sums, weights, strict=True)
        ]

    def total(self, builder: Any, sums: list[Any]) -> Any:
        high, low = sums
        return builder.add(builder.shl(high, ir.Constant(high.type, [8] * 16)), low)


class Emulated(Avx512):
    """Avx512's code with its two instructions in generic IR, to run it on any CPU."""

    name = "emulated"

    def lookup(self, builder: Any, table: Any, index: Any) -> Any:
        return Portable.lookup(self, builder, table, index)

    def dot(self, builder: Any, total: Any, octets: Any, weights: Any) -> Any:
        bytes64, wide = ir.VectorType(_I8, 64), ir.VectorType(_I32, 64)
        u = builder.zext(builder.bitcast(octets, bytes64), wide)
        w = builder.sext(builder.bitcast(weights, bytes64), wide)
        return Portable.add(self, builder, [total], u, w)[0]


def _declare(builder: Any, name: str, kind: Any) -> Any:
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, kind, name)


PATHS = {path.name: path for path in (Avx512(), Avx2(), Portable(), Emulated())}


def available() -> list[str]:
    """Names of the paths that this CPU runs, fastest first."""
    has = binding.get_host_cpu_features()
    names = ["avx512"] if has.get("avx512vnni") and has.get("avx512bw") else []
    return [*names, *(["avx2"] if has.get("avx2") else []), "portable"]


def _chosen() -> str:
    """KVMESH_SIMD, or the fastest path of this CPU."""
    name = os.environ.get("KVMESH_SIMD") or available()[0]
    if name not in (*available(), "emulated"):
        raise ValueError(f"KVMESH_SIMD is {name!r}, this CPU runs {', '.join(available())}")
    return name


CHOSEN = _chosen()
