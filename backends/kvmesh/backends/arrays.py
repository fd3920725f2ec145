"""Memory for arrays that kernels and ONNX Runtime work on in place."""

import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cuda.device import Place

_ALIGNMENT = 64  # bytes; a cache line, and the widest vector load

_Scalar = TypeVar("_Scalar", bound=np.generic)


def aligned_zeros(shape: tuple[int, ...], dtype: type[_Scalar]) -> npt.NDArray[_Scalar]:
    """Like np.zeros, with the first element on a cache line.

    The system gives a page when it is first written, so what is never used costs no memory.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class HostMemory:
    """Main memory, as ort.Memory."""

    place = Place("cpu")

    def zeros(self, shape: tuple[int, ...], dtype: type[_Scalar]) -> npt.NDArray[_Scalar]:
        return aligned_zeros(shape, dtype)

    def put(self, source: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(source)

    def pointer(self, array: npt.NDArray[Any]) -> int:
        return int(array.ctypes.data)
