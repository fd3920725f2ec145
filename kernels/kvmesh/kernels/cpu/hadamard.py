"""The Hadamard transform of one vector, as rotation.py defines it."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils

from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.jit import kernel
from kvmesh.kernels.cpu.vectors import FLOAT, I64, INT, WIDTH, Emitter, function
from kvmesh.kernels.layout import MAX_HEAD_DIM

cgutils: Any = untyped_cgutils


def _within(at: Emitter, x: Any, span: int) -> Any:
    """Sums and differences of lanes that lie `span` apart in one vector."""
    b = at.b
    lanes = range(WIDTH)
    other = simd.shuffle(b, x, x, [i ^ span for i in lanes])
    upper = ir.Constant(ir.VectorType(ir.IntType(1), WIDTH), [bool(i & span) for i in lanes])
    return b.select(upper, b.fsub(other, x), b.fadd(x, other))


def _between(at: Emitter, x: Any, size: Any, span: int) -> None:
    """The same of vectors, `span` elements apart, of all of x."""
    b = at.b
    with cgutils.for_range(b, b.udiv(size, I64(2 * WIDTH))) as loop:
        first = b.mul(loop.index, I64(WIDTH))
        inside = b.and_(first, I64(span - 1))
        low_at = b.add(b.shl(b.sub(first, inside), I64(1)), inside)
        high_at = b.add(low_at, I64(span))
        low, high = at.load(FLOAT, x, low_at), at.load(FLOAT, x, high_at)
        at.store(FLOAT, b.fadd(low, high), x, low_at)
        at.store(FLOAT, b.fsub(low, high), x, high_at)


def _butterflies(b: Any, x: Any, size: Any, columns: Any) -> None:
    at = Emitter(b)
    with cgutils.for_range(b, b.udiv(size, I64(WIDTH))) as loop:
        i = b.mul(loop.index, I64(WIDTH))
        value = at.load(FLOAT, x, i)
        for span in (1, 2, 4):
            wanted = b.icmp_unsigned(">", columns, I64(span))
            value = b.select(wanted, _within(at, value, span), value)
        at.store(FLOAT, value, x, i)
    span = WIDTH
    while span < MAX_HEAD_DIM:
        with b.if_then(b.icmp_unsigned(">", columns, I64(span))):
            _between(at, x, size, span)
        span *= 2


# Of every run of `columns` elements, a power of two, of fp32 x: (x, size, columns)
_transform = function("butterflies", _butterflies, types.none, [INT] * 3)


@kernel
def hadamard(x: Any, base: Any) -> None:
    """Unnormalised Hadamard transform of fp32 [dim], contiguous, in place; base: rotation.base."""
    count = base.shape[0]
    columns = x.size // count
    _transform(x.ctypes.data, x.size, columns)
    if count > 1:
        before = np.empty(x.size, np.float32)
        for i in range(x.size):
            before[i] = x[i]
        for i in range(x.size):
            total = base[i // columns, 0] * before[i % columns]
            for j in range(1, count):
                total = total + base[i // columns, j] * before[j * columns + i % columns]
            x[i] = total
