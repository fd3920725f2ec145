"""TurboQuant (arXiv 2504.19874) as published, and QJL (arXiv 2406.03482). For comparison only,
never for serving.

Both rotate by a Haar-random matrix and never subtract a mean. Vectors are fp64 [n, d]; norms are
rounded to fp16, as they would be stored.
"""

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.codebook import lloyd_max

Vectors = npt.NDArray[np.float64]
_FLOAT_BITS = 16


@functools.cache
def haar(dim: int, seed: int) -> Vectors:
    q, r = np.linalg.qr(np.random.default_rng((seed, dim)).standard_normal((dim, dim)))
    return np.asarray(q * np.sign(np.diag(r)))


@functools.cache
def _levels(bits: int) -> tuple[Vectors, Vectors]:
    """Levels and the borders between them, ascending."""
    positive = np.array(lloyd_max(bits, 1e-12))
    levels = np.concatenate((-positive[::-1], positive))
    return levels, (levels[1:] + levels[:-1]) / 2


def half(x: Vectors) -> Vectors:
    return np.asarray(x.astype(np.float16).astype(np.float64))


def _norms(x: Vectors) -> Vectors:
    return np.asarray(np.linalg.norm(x, axis=1, keepdims=True))


@dataclass(frozen=True, slots=True)
class TurboQuantMse:
    """The paper's Algorithm 1: the norm, and each rotated coordinate's nearest centroid."""

    bits: int
    seed: int = 1

    def bits_per_element(self, dim: int) -> float:
        return self.bits + _FLOAT_BITS / dim

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        dim = x.shape[1]
        norm = _norms(x)
        rotation = haar(dim, self.seed)
        levels, borders = _levels(self.bits)
        z = x / np.where(norm > 0, norm, 1) @ rotation.T * np.sqrt(dim)
        coded = levels[np.searchsorted(borders, z)]
        return np.asarray(half(norm) * (coded @ rotation) / np.sqrt(dim))


@dataclass(frozen=True, slots=True)
class Qjl:
    """One sign of each of `signs_per_element` * d Gaussian projections, and the norm: unbiased."""

    signs_per_element: int = 1
    seed: int = 2

    def bits_per_element(self, dim: int) -> float:
        return self.signs_per_element + _FLOAT_BITS / dim

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        """The vector whose products with any query are the method's estimates."""
        dim = x.shape[1]
        rows = self.signs_per_element * dim
        sketch = np.random.default_rng((self.seed, dim)).standard_normal((rows, dim))
        signs = np.where(x @ sketch.T >= 0, 1.0, -1.0)
        return np.asarray(np.sqrt(np.pi / 2) / rows * half(_norms(x)) * (signs @ sketch))

    def inner_products(self, queries: Vectors, x: Vectors) -> Vectors:
        """Unbiased estimates of queries [m, d] times x [n, d]: [m, n]."""
        return np.asarray(queries @ self.quantize_dequantize(x).T)


@dataclass(frozen=True, slots=True)
class TurboQuantProd:
    """The paper's Algorithm 2: bits - 1 for the centroid, one for the residual's sign; unbiased."""

    bits: int
    seed: int = 1

    def bits_per_element(self, dim: int) -> float:
        return self.bits + 2 * _FLOAT_BITS / dim

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        """The vector whose products with any query are the method's estimates."""
        coarse = np.zeros_like(x)
        if self.bits > 1:
            coarse = TurboQuantMse(self.bits - 1, self.seed).quantize_dequantize(x)
        return coarse + Qjl(1, self.seed + 1).quantize_dequantize(x - coarse)

    def inner_products(self, queries: Vectors, x: Vectors) -> Vectors:
        """Unbiased estimates of queries [m, d] times x [n, d]: [m, n]."""
        return np.asarray(queries @ self.quantize_dequantize(x).T)


@dataclass(frozen=True, slots=True)
class OutlierSplit:
    """A quarter of the channels, the largest, with one bit more; each part a TurboQuantMse.

    OutlierSplit(2) is the paper's 2.5 bits, OutlierSplit(3) its 3.5, at d = 128.
    """

    bits: int

    def bits_per_element(self, dim: int) -> float:
        """Both norms counted; which channels are large is stored once per head, not per vector."""
        return self.bits + (dim // 4 + 2 * _FLOAT_BITS) / dim

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        order = np.argsort(-(x**2).sum(axis=0), kind="stable")
        large, small = order[: x.shape[1] // 4], order[x.shape[1] // 4 :]
        out = np.empty_like(x)
        out[:, large] = TurboQuantMse(self.bits + 1).quantize_dequantize(x[:, large])
        out[:, small] = TurboQuantMse(self.bits).quantize_dequantize(x[:, small])
        return out
