"""The random rotation R = H D that makes every coordinate of a vector near Gaussian.

D is a diagonal of +-1 drawn from a fixed seed, H the normalised Walsh-Hadamard matrix. Both are
their own inverse up to order: R^T = D H. Without D a constant vector would collapse into one
coordinate. Prior art: TurboQuant, DRIVE/EDEN, HIGGS.

Order of the arithmetic, part of the format: butterflies of span 1, 2, 4, ..., head_dim / 2, each
(a + b, a - b) in fp32, never fused.
"""

import functools
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

ROTATION_SEED = 0x6B766D657368  # "kvmesh"; in every header

_Float = TypeVar("_Float", bound=np.floating[Any])
_MASK = (1 << 64) - 1


def _splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea, Flood 2014): the same on every platform."""
    z = (state * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@functools.cache
def signs(head_dim: int) -> npt.NDArray[np.float32]:
    """The diagonal of D: fp32 [head_dim] of +1 and -1, read-only."""
    drawn = [_splitmix64(ROTATION_SEED + j + 1) >> 63 for j in range(head_dim)]
    diagonal = np.array([1.0 - 2.0 * bit for bit in drawn], np.float32)
    diagonal.setflags(write=False)
    return diagonal


def hadamard(x: npt.NDArray[_Float]) -> npt.NDArray[_Float]:
    """The unnormalised Walsh-Hadamard transform along the last axis, in x's own precision."""
    dim = x.shape[-1]
    y: npt.NDArray[Any] = x
    span = 1
    while span < dim:
        pairs = y.reshape(*x.shape[:-1], dim // (2 * span), 2, span)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack((low + high, low - high), axis=-2).reshape(x.shape)
        span *= 2
    return y
