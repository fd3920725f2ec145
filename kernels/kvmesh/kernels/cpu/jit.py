"""The one way a CPU kernel is compiled, and the numeric pieces that all of them share.

Compiled without fast-math and without threads inside: a sum is always added up in the order
written, so a result does not depend on the machine's vector width or on the batch.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvmesh.kernels.cpu import simd

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

_HALF_MAX = np.float32(65504.0)
_HALF = np.float32(0.5)
_TO_NORMAL = np.float32(2.0**112)


def _sources_digest() -> str:
    """Names the state of every file that machine code is made from, and the instruction set."""
    here = Path(__file__).parent
    digest = hashlib.sha256(simd.CHOSEN.encode())
    for path in sorted([*here.glob("*.py"), *here.parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_DIGEST = _sources_digest()


def kernel(function: _Kernel) -> _Kernel:
    """Compiles a function that other kernels call, without the GIL; Python cannot call it.

    Without the wrappers for Python, whose code for tuples of arrays takes long to compile.
    """
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    njit: Any = numba.njit  # its stubs do not know these two
    return cast(_Kernel, njit(nogil=True, error_model="numpy", **options)(function))


def entry(function: _Kernel) -> _Kernel:
    """Compiles a kernel that Python calls; its machine code is kept beside the source.

    Numba looks only at the entry's own file for changes, not at what it calls and not at constants
    from elsewhere. So the name under which it is kept carries a digest of all of them.
    """
    function.__qualname__ = f"{function.__qualname__}_{_DIGEST}"
    compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return cast(_Kernel, compiled)


def _read_cycles(typing_context: Any) -> Any:
    """The processor's cycle counter, uint64; 0 where there is none. Only ratios mean anything."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [])
        counter = builder.module.declare_intrinsic("llvm.readcyclecounter", fnty=kind)
        return builder.call(counter, [])

    return types.uint64(), emit


cycles: Any = intrinsic(_read_cycles)


@kernel
def to_half(x: Any) -> Any:
    """The bits of the fp16 nearest to x (ties to even), clamped to the finite range."""
    bits = np.float32(x).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = min(abs(x), _HALF_MAX)
    bits = np.float32(size).view(np.uint32)
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    normal = (bits - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    tiny = np.float32(size + _HALF).view(np.uint32) - np.uint32(0x3F000000)
    value = tiny if bits < np.uint32(0x38800000) else normal
    return np.uint16(sign | value)


@kernel
def from_half(half: Any) -> Any:
    """The fp32 of a finite fp16's bits."""
    bits = np.uint32(half)
    size = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * _TO_NORMAL
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    return np.uint32(np.float32(size).view(np.uint32) | sign).view(np.float32)
