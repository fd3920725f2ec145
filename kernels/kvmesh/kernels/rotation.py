"""The random rotation R = H D that makes every coordinate of a vector near Gaussian.

D is a diagonal of +-1 drawn from a fixed seed, H a symmetric Hadamard matrix over its norm: R^T =
D H. Without D a constant vector would collapse into one coordinate. Prior art: TurboQuant,
DRIVE/EDEN, HIGGS.

H = P (x) W: with m the odd part of head_dim, W is the Walsh-Hadamard matrix of order
head_dim / (4 m) and P one of order 4 m built by Paley (1933); a power of two has no P.

    80 = 20 x 4    96 = 12 x 8    112 = 28 x 4    192 = 12 x 16    576 = 36 x 16

Order of the arithmetic, part of the format: butterflies of span 1, 2, 4, ..., order of W / 2, each
(a + b, a - b) in fp32, never fused; then each row of P as a sum from its first element to its last.
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


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def _odd_part(n: int) -> int:
    return n // (n & -n)


def has_rotation(head_dim: int) -> bool:
    """Whether a Hadamard matrix of this order is one that `hadamard` can build."""
    odd = _odd_part(head_dim)
    if odd == 1:
        return True
    return head_dim % 4 == 0 and (_is_prime(4 * odd - 1) or _is_prime_1_mod_4(2 * odd - 1))


def _is_prime_1_mod_4(n: int) -> bool:
    return n % 4 == 1 and _is_prime(n)


def _characters(q: int) -> npt.NDArray[np.float32]:
    """The quadratic character of 0..q-1 modulo a prime q: 0, 1 for squares, -1 for others."""
    character = np.full(q, -1, np.float32)
    character[np.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    return character


@functools.cache
def base(head_dim: int) -> npt.NDArray[np.float32]:
    """P: fp32 [4 m, 4 m] of +1 and -1, symmetric, read-only; [[1]] for a power of two.

    Raises ValueError for an order that neither construction of Paley's reaches.
    """
    odd = _odd_part(head_dim)
    if not has_rotation(head_dim):
        raise ValueError(f"no Hadamard matrix of order {head_dim}")
    if odd == 1:
        matrix = np.ones((1, 1), np.float32)
    elif _is_prime(q := 4 * odd - 1):
        both = np.add.outer(np.arange(q), np.arange(q)) % q
        matrix = np.ones((q + 1, q + 1), np.float32)
        matrix[1:, 1:] = -_characters(q)[both] - (both == 0)
    else:
        q = 2 * odd - 1
        conference = np.ones((q + 1, q + 1), np.float32)
        conference[0, 0] = 0
        conference[1:, 1:] = _characters(q)[np.subtract.outer(np.arange(q), np.arange(q)) % q]
        matrix = np.kron(conference, np.array([[1, 1], [1, -1]], np.float32))
        matrix += np.kron(np.eye(q + 1), np.array([[1, -1], [-1, -1]])).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def hadamard(x: npt.NDArray[_Float]) -> npt.NDArray[_Float]:
    """The unnormalised Hadamard transform along the last axis, in x's own precision."""
    dim = x.shape[-1]
    matrix = base(dim)
    columns = dim // len(matrix)
    y: npt.NDArray[Any] = x
    span = 1
    while span < columns:
        pairs = y.reshape(*x.shape[:-1], dim // (2 * span), 2, span)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack((low + high, low - high), axis=-2).reshape(x.shape)
        span *= 2
    if len(matrix) == 1:
        return y
    rows = y.reshape(*x.shape[:-1], len(matrix), columns)
    signed = matrix.astype(x.dtype)
    total: npt.NDArray[Any] = signed[:, :1] * rows[..., :1, :]
    for i in range(1, len(matrix)):
        total = total + signed[:, i : i + 1] * rows[..., i : i + 1, :]
    return total.reshape(x.shape)
