"""Uniform and hardware number formats: KIVI, int8, fp8 e4m3, NVFP4, q4_0. For comparison only,
never for serving. Vectors are fp64 [n, d], in the order of their tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float64]
_FLOAT_BITS = 16
_E4M3_MOST = 448.0
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _half(x: Vectors) -> Vectors:
    return np.asarray(x.astype(np.float16).astype(np.float64))


def _or_one(x: Vectors) -> Vectors:
    return np.where(x != 0, x, 1.0)


def to_e4m3(x: Vectors) -> Vectors:
    """The nearest fp8 e4m3 numbers (ties to even), saturating at 448."""
    size = np.minimum(np.abs(x), _E4M3_MOST)
    exponent = np.maximum(np.frexp(_or_one(size))[1] - 1, -6)
    step = np.ldexp(1.0, exponent - 3)
    return np.asarray(np.copysign(np.minimum(np.rint(size / step) * step, _E4M3_MOST), x))


@dataclass(frozen=True, slots=True)
class Kivi:
    """KIVI (arXiv 2402.02750): min-max in groups of 32; keys per channel, values per token."""

    bits: int
    kind: Literal["key", "value"]
    group: int = 32

    def bits_per_element(self, dim: int) -> float:
        return self.bits + 2 * _FLOAT_BITS / self.group

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        """Keys: n must be a multiple of the group; values: d must be."""
        rows = x.T if self.kind == "key" else x
        groups = rows.reshape(len(rows), -1, self.group)
        low = _half(groups.min(axis=2, keepdims=True))
        most = (1 << self.bits) - 1
        step = _or_one(_half((groups.max(axis=2, keepdims=True) - low) / most))
        back = np.clip(np.rint((groups - low) / step), 0, most) * step + low
        back = back.reshape(rows.shape)
        return np.asarray(back.T if self.kind == "key" else back)


@dataclass(frozen=True, slots=True)
class Int8:
    """Per token: the largest magnitude is 127."""

    def bits_per_element(self, dim: int) -> float:
        return 8 + _FLOAT_BITS / dim

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        step = _or_one(_half(np.abs(x).max(axis=1, keepdims=True) / 127))
        return np.asarray(np.clip(np.rint(x / step), -127, 127) * step)


@dataclass(frozen=True, slots=True)
class Fp8:
    """fp8 e4m3 with one scale per tensor, which costs no bits that count."""

    def bits_per_element(self, dim: int) -> float:
        return 8.0

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        scale = float(np.abs(x).max()) / _E4M3_MOST or 1.0
        return np.asarray(to_e4m3(x / scale) * scale)


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """e2m1 in blocks of 16, each with an e4m3 scale; one fp32 scale per tensor."""

    def bits_per_element(self, dim: int) -> float:
        return 4 + 8 / 16

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        tensor = float(np.abs(x).max()) / (_E4M3_MOST * _E2M1[-1]) or 1.0
        blocks = x.reshape(len(x), -1, 16) / tensor
        scale = _or_one(to_e4m3(np.abs(blocks).max(axis=2, keepdims=True) / _E2M1[-1]))
        codes = np.searchsorted((_E2M1[1:] + _E2M1[:-1]) / 2, np.abs(blocks / scale))
        return np.asarray((np.copysign(_E2M1[codes], blocks) * scale * tensor).reshape(x.shape))


@dataclass(frozen=True, slots=True)
class Q4_0:
    """llama.cpp's q4_0: blocks of 32, the element of largest magnitude becomes -8."""

    def bits_per_element(self, dim: int) -> float:
        return 4 + _FLOAT_BITS / 32

    def quantize_dequantize(self, x: Vectors) -> Vectors:
        blocks = x.reshape(len(x), -1, 32)
        at = np.abs(blocks).argmax(axis=2)[..., None]
        step = np.take_along_axis(blocks, at, axis=2) / -8
        codes = np.clip(np.floor(blocks / _or_one(step) + 8.5), 0, 15)
        return np.asarray(((codes - 8) * _half(step)).reshape(x.shape))
