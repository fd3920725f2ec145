"""Lloyd-Max codebooks for a unit Gaussian: what each coordinate of a rotated vector is.

One table serves every head_dim: at 128 it costs less than 0.1 % of mean squared error against the
table of the exact sphere marginal. Sources: Max 1960, Lloyd 1982; use for vectors: TurboQuant
(arXiv 2504.19874), HIGGS (arXiv 2411.17525).

A code of 1 to 4 bits is the number of thresholds below the coordinate, stored as sign and
magnitude: the highest bit says negative, the others count up from the smallest magnitude. So 0 is
the smallest positive level, and a decoder needs a table of magnitudes only.

A code of 8 bits is an int8, the coordinate's nearest multiple of 1/32 (ties to even) within
+-127/32: such codes multiply as they are. 1/32 is the optimal step of a 256-level uniform
quantizer (0.0308) to 1.5 %, and exact.
"""

import functools
import itertools
import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt

CODEBOOK_VERSION = 1  # in every header; a changed table is another version
INT8_STEP = 2.0**-5
INT8_MOST = 127

# Frozen from lloyd_max(bits), which the tests compare them with: the bytes of a block must not
# depend on a platform's erf.
_MAGNITUDES = {
    1: (0.797884560803,),
    2: (0.452780034636, 1.510417608499),
    3: (0.245094178944, 0.756005281206, 1.343909278505, 2.151945704537),
    4: (
        0.128395029851, 0.388048299490, 0.656759118532, 0.942340456487,
        1.256231197347, 1.618046386022, 2.069017226531, 2.732589570995,
    ),
}  # fmt: skip


def _density(t: float) -> float:
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def _mass_above(t: float) -> float:
    return math.erfc(t / math.sqrt(2)) / 2


def lloyd_max(bits: int, tolerance: float = 1e-14) -> list[float]:
    """The positive levels of the optimal 2^bits-level quantizer of N(0, 1), ascending.

    Each level is the mean of its cell, each border the midpoint of two levels.
    """
    count = 1 << (bits - 1)
    levels = [3 * (i + 0.5) / count for i in range(count)]
    moved = math.inf
    while moved > tolerance:
        middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
        borders = [0.0, *middles, math.inf]
        means = [
            (_density(a) - _density(b)) / (_mass_above(a) - _mass_above(b))
            for a, b in itertools.pairwise(borders)
        ]
        moved = max(abs(a - b) for a, b in zip(levels, means, strict=True))
        levels = means
    return levels


def _frozen(table: npt.NDArray[np.generic]) -> Any:
    table.setflags(write=False)
    return table


@functools.cache
def levels(bits: int) -> npt.NDArray[np.float32]:
    """The value of each stored code: fp32 [2^bits], of 8 bits by their bytes (two's complement)."""
    if bits == 8:
        steps = np.arange(256, dtype=np.uint8).view(np.int8)
        return cast(npt.NDArray[np.float32], _frozen(steps * np.float32(INT8_STEP)))
    positive = np.array(_MAGNITUDES[bits], np.float32)
    return cast(npt.NDArray[np.float32], _frozen(np.concatenate((positive, -positive))))


@functools.cache
def thresholds(bits: int) -> npt.NDArray[np.float32]:
    """The borders between codes of 1 to 4 bits: fp32 [2^bits - 1], ascending."""
    positive = np.array(_MAGNITUDES[bits])
    middles = (positive[1:] + positive[:-1]) / 2
    table = np.concatenate((-middles[::-1], [0.0], middles)).astype(np.float32)
    return cast(npt.NDArray[np.float32], _frozen(table))


@functools.cache
def stored_codes(bits: int) -> npt.NDArray[np.uint8]:
    """The code of 1 to 4 bits stored for each number of thresholds passed: uint8 [2^bits]."""
    half = 1 << (bits - 1)
    table = np.array([*range(2 * half - 1, half - 1, -1), *range(half)], np.uint8)
    return cast(npt.NDArray[np.uint8], _frozen(table))


def quantize(z: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.uint8]:
    """The stored code of each coordinate: uint8, like z."""
    if bits == 8:
        steps = np.clip(np.rint(z * np.float32(1 / INT8_STEP)), -INT8_MOST, INT8_MOST)
        codes: npt.NDArray[np.uint8] = steps.astype(np.int8).view(np.uint8)
    else:
        codes = stored_codes(bits)[np.searchsorted(thresholds(bits), z, side="left")]
    return codes


@functools.cache
def levels_by_byte(bits: int) -> npt.NDArray[np.float32]:
    """All levels that one byte of codes holds, the lowest bits first.

    fp32 [256, 2] for 4 bits and [256, 4] for 2; for 3, whose sign lies in a plane of its own, the
    magnitudes of the four 2-bit codes: [256, 4].
    """
    width = 4 if bits == 4 else 2
    shifts = np.arange(0, 8, width)
    codes = np.arange(256)[:, None] >> shifts & ((1 << width) - 1)
    return cast(npt.NDArray[np.float32], _frozen(np.ascontiguousarray(levels(bits)[codes])))
