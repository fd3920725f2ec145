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
ROWS = 4  # most rows of weights that share one pass over the codes; sums stay in registers
ORDER = (0, 2, 1, 3)  # where each of four 16-bit weights lies: even ones are a pair, and odd ones

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def splat(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return shuffle(builder, one, one, [0] * count)


def shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    """Elements of a and b, numbered one after the other, in an order."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), order))


def prefetch(builder: Any, address: Any, level: int = 1) -> None:
    """Asks for the cache line at an int64 address, to read it soon. level: 1: the first cache."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [_I8.as_pointer()], kind)
    place = builder.inttoptr(address, _I8.as_pointer())
    builder.call(fetch, [place, _I32(0), _I32(4 - level), _I32(1)])  # to read, data


class Portable:
    """Generic vector IR: LLVM makes of it what the CPU has."""

    name = "portable"
    lanes = 8
    groups = 2  # of lanes that share the loads of weights; all lanes are a multiple of 16
    levels: tuple[int, ...] = (1,)  # caches that are filled one tile ahead of use, two tiles, ...
    strict = True  # whether the bits of an index that a lookup does not mind must be clear
    sums = 1  # accumulators of each row
    halves = 1  # parts that a register of octets is multiplied in
    split = False  # whether it takes weights as high and low bytes

    def lookup(self, builder: Any, table: Any, index: Any) -> Any:
        """The table's byte for the low four bits of each byte of index. Of its other bits the
        highest is clear; those of a path that is not strict may be anything."""
        index = builder.and_(index, ir.Constant(index.type, [_I8(15)] * (4 * self.lanes)))
        out = ir.Constant(index.type, ir.Undefined)
        for i in range(4 * self.lanes):
            at = builder.zext(builder.extract_element(index, _I32(i)), _I32)
            out = builder.insert_element(out, builder.extract_element(table, at), _I32(i))
        return out

    def half(self, builder: Any, octets: Any, number: int) -> Any:
        """Some elements of every word, as `add` multiplies them."""
        return builder.zext(octets, ir.VectorType(_I32, 4 * self.lanes))

    def weights(self, builder: Any, wide: Any, high_low: Any, at: Any, half: int) -> Any:
        """Weights of a half, for each lane. wide: i16*; high_low: (i8*, i8*); at: index of the
        first of the word's four."""
        four = builder.load(
            builder.bitcast(builder.gep(wide, [at]), ir.VectorType(_I16, 4).as_pointer()), align=2
        )
        four = builder.sext(four, ir.VectorType(_I32, 4))
        return shuffle(builder, four, four, [ORDER[i % 4] for i in range(4 * self.lanes)])

    def add(self, builder: Any, sums: list[Any], part: Any, weights: Any) -> list[Any]:
        product = builder.mul(part, weights)
        for i in range(4):
            lane = shuffle(builder, product, product, list(range(i, 4 * self.lanes, 4)))
            sums = [builder.add(sums[0], lane)]
        return sums

    def total(self, builder: Any, sums: list[Any]) -> Any:
        return sums[0]


class Avx2(Portable):
    """vpshufb, and vpmaddwd on 16-bit integers, which adds two products in each lane.

    For 32 bytes of 4-bit codes: 9 operations to widen them, 8 for each row of weights. So four rows
    take 41 of Zen 3's four a cycle: 3.1 bytes a cycle. vpmaddubsw would need weights of 13 bits in
    two bytes, and 6 operations where this needs 4.
    """

    name = "avx2"
    halves = 2

    def lookup(self, builder: Any, table: Any, index: Any) -> Any:
        return _look_up(builder, "llvm.x86.avx2.pshuf.b", table, index)

    def half(self, builder: Any, octets: Any, number: int) -> Any:
        """Elements 0 and 2 of every word, or 1 and 3, as 16-bit integers."""
        kind = ir.VectorType(_I16, 16)
        pairs = builder.bitcast(octets, kind)
        if number == 0:
            return builder.and_(pairs, ir.Constant(kind, [_I16(255)] * 16))
        return builder.lshr(pairs, ir.Constant(kind, [_I16(8)] * 16))

    def weights(self, builder: Any, wide: Any, high_low: Any, at: Any, half: int) -> Any:
        place = builder.gep(wide, [builder.add(at, _I64(2 * half))])
        pair = builder.load(builder.bitcast(place, _I32.as_pointer()), align=2)
        return builder.bitcast(splat(builder, pair, 8), ir.VectorType(_I16, 16))

    def add(self, builder: Any, sums: list[Any], part: Any, weights: Any) -> list[Any]:
        """As assembly text, because LLVM would add the products to each other first: then more of
        them are kept than there are registers."""
        kind, half = ir.VectorType(_I32, 8), ir.VectorType(_I16, 16)
        call = ir.FunctionType(ir.LiteralStructType([kind, kind]), [kind, half, half])
        text = "vpmaddwd $4, $3, $1\n\tvpaddd $1, $0, $0"
        both = builder.asm(call, text, "=x,=&x,0,x,x", [*sums, part, weights], False)
        return [builder.extract_value(both, 0)]


class Avx512(Portable):
    """vpshufb and vpdpbusd, which adds four products of bytes in each lane.

    A product ends four cycles after it began and two begin in each: so less than eight sums at a
    time would wait, and the sixteen of two groups do not.
    """

    name = "avx512"
    lanes = 16
    halves = 1
    sums = 2  # of the high and of the low bytes
    split = True
    levels = (1, 2)  # the first cache can wait for few lines at a time: not for memory too

    def lookup(self, builder: Any, table: Any, index: Any) -> Any:
        return _look_up(builder, "llvm.x86.avx512.pshuf.b.512", table, index)

    def half(self, builder: Any, octets: Any, number: int) -> Any:
        return builder.bitcast(octets, ir.VectorType(_I32, 16))

    def weights(self, builder: Any, wide: Any, high_low: Any, at: Any, half: int) -> Any:
        four = _I32.as_pointer()
        return [
            splat(builder, builder.load(builder.bitcast(builder.gep(x, [at]), four), align=1), 16)
            for x in high_low
        ]

    def dot(self, builder: Any, total: Any, octets: Any, weights: Any) -> Any:
        kind = ir.VectorType(_I32, 16)
        name = "llvm.x86.avx512.vpdpbusd.512"
        call = declared(builder, name, ir.FunctionType(kind, [kind, kind, kind]))
        return builder.call(call, [total, octets, weights])

    def add(self, builder: Any, sums: list[Any], part: Any, weights: Any) -> list[Any]:
        return [
            self.dot(builder, total, part, four) for total, four in zip(sums, weights, strict=True)
        ]

    def total(self, builder: Any, sums: list[Any]) -> Any:
        high, low = sums
        return builder.add(builder.shl(high, ir.Constant(high.type, [8] * 16)), low)


class Vbmi(Avx512):
    """vpermb in place of vpshufb: it minds six bits of an index, and of the table that repeats
    after four of them any two are right. So codes are looked up without being masked."""

    name = "avx512vbmi"
    strict = False

    def lookup(self, builder: Any, table: Any, index: Any) -> Any:
        return _look_up(builder, "llvm.x86.avx512.permvar.qi.512", table, index)


class Emulated(Vbmi):
    """Vbmi's code with its two instructions in generic IR, to run it on any CPU.

    Each is a function, which is compiled once: written out wherever the loops have one, they would
    take LLVM three times as long as all other kernels.
    """

    name = "emulated"

    def lookup(self, builder: Any, table: Any, index: Any) -> Any:
        def emit(inner: Any, table: Any, index: Any) -> Any:
            return Portable.lookup(self, inner, table, index)

        return called(builder, "kvmesh_emulated_lookup", emit, index.type, [table, index])

    def dot(self, builder: Any, total: Any, octets: Any, weights: Any) -> Any:
        def emit(inner: Any, total: Any, octets: Any, weights: Any) -> Any:
            bytes64, wide = ir.VectorType(_I8, 64), ir.VectorType(_I32, 64)
            u = inner.zext(inner.bitcast(octets, bytes64), wide)
            w = inner.sext(inner.bitcast(weights, bytes64), wide)
            return Portable.add(self, inner, [total], u, w)[0]

        arguments = [total, octets, weights]
        return called(builder, "kvmesh_emulated_dot", emit, weights.type, arguments)


def called(
    builder: Any, name: str, emit: Any, result: Any, arguments: Any, inlining: str = "noinline"
) -> Any:
    """A call of the module's function of that name, made by emit(builder, *arguments) if new.

    result: the LLVM type of what emit returns; void if that is None.
    """
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = ir.Function(builder.module, kind, name)
        function.linkage = "linkonce_odr"
        function.attributes.add(inlining)
        inner = ir.IRBuilder(function.append_basic_block())
        found = emit(inner, *function.args)
        if found is None:
            inner.ret_void()
        else:
            inner.ret(found)
    return builder.call(function, arguments)


def _look_up(builder: Any, name: str, table: Any, index: Any) -> Any:
    """By an instruction that takes its table, of sixteen bytes, as often as a register holds it."""
    kind = index.type
    whole = shuffle(builder, table, table, [i % 16 for i in range(kind.count)])
    return builder.call(
        declared(builder, name, ir.FunctionType(kind, [kind, kind])), [whole, index]
    )


def declared(builder: Any, name: str, kind: Any) -> Any:
    """The module's function of that name and type, which is defined elsewhere."""
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, kind, name)


PATHS: dict[str, Portable] = {
    path.name: path for path in (Vbmi(), Avx512(), Avx2(), Portable(), Emulated())
}


def available() -> list[str]:
    """Names of the paths that this CPU runs, fastest first."""
    has = binding.get_host_cpu_features()
    names = ["avx512"] if has.get("avx512vnni") and has.get("avx512bw") else []
    if names and has.get("avx512vbmi"):
        names.insert(0, "avx512vbmi")
    if has.get("avx2"):
        names.append("avx2")
    return [*names, "portable"]


def _chosen() -> str:
    """KVMESH_SIMD, or the fastest path of this CPU."""
    name = os.environ.get("KVMESH_SIMD") or available()[0]
    if name not in (*available(), "emulated"):
        raise ValueError(f"KVMESH_SIMD is {name!r}, this CPU runs {', '.join(available())}")
    return name


CHOSEN = _chosen()
binding.initialize_native_asmparser()  # for the lines of assembly in Avx2
