"""Codebooks for a unit Gaussian, which is what each coordinate of a rotated vector is.

Lloyd-Max levels (Max 1960, Lloyd 1982; use for vectors: TurboQuant, arXiv 2504.19874, and HIGGS,
arXiv 2411.17525), each moved to the nearest odd multiple of half a step:

    level = (u - 127.5) * step,   u an integer in 0..255

So a decoded code is an unsigned byte that integer dot products take as it is, -level is the byte's
complement, and nothing is lost between what is stored and what a kernel multiplies. The move costs
0.045 % of the mean squared error at 4 bits and less than 0.002 % at 1 to 3. Steps are multiples of
2^-16 small enough that levels are exact in fp32. One table serves every head_dim: at 128 it costs
less than 0.1 % against the table of the exact sphere marginal.

A code of 1 to 4 bits is the number of thresholds below the coordinate, stored as sign and
magnitude: the highest bit says negative, the others count up from the smallest magnitude. A code of
8 bits is u itself, with a step of 1/32: the optimal step of a 256-level uniform quantizer (0.0308)
to 1.5 %, and exact.
"""

import functools
import itertools
import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt

CODEBOOK_VERSION = 2  # in every header; a changed table is another version
GRID_MIDDLE = 127.5
STEPS_8 = 32  # of 8 bits, in one standard deviation

# bits: (step in multiples of 2^-16, u - 127.5 of the positive levels). Found by trying every step:
# the one whose rounded lloyd_max(bits) has the least mean squared error. Tests compare them.
_GRIDS = {
    1: (420, (124.5,)),
    2: (1005, (29.5, 98.5)),
    3: (1287, (12.5, 38.5, 68.5, 109.5)),
    4: (1566, (5.5, 16.5, 27.5, 39.5, 52.5, 67.5, 86.5, 114.5)),
}


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


def step(bits: int) -> float:
    """The distance of neighbouring u, in standard deviations; exact in fp32."""
    return 1 / STEPS_8 if bits == 8 else _GRIDS[bits][0] / 65536


@functools.cache
def grid(bits: int) -> npt.NDArray[np.uint8]:
    """u of each stored code: uint8 [2^bits]."""
    if bits == 8:
        return cast(npt.NDArray[np.uint8], _frozen(np.arange(256, dtype=np.uint8)))
    positive = np.array(_GRIDS[bits][1])
    both = np.concatenate((GRID_MIDDLE + positive, GRID_MIDDLE - positive))
    return cast(npt.NDArray[np.uint8], _frozen(both.astype(np.uint8)))


@functools.cache
def levels(bits: int) -> npt.NDArray[np.float32]:
    """The value of each stored code: fp32 [2^bits]."""
    exact = (grid(bits).astype(np.float64) - GRID_MIDDLE) * step(bits)
    return cast(npt.NDArray[np.float32], _frozen(exact.astype(np.float32)))


@functools.cache
def thresholds(bits: int) -> npt.NDArray[np.float32]:
    """The borders between codes of 1 to 4 bits: fp32 [2^bits - 1], ascending, exact."""
    ascending = np.sort(levels(bits).astype(np.float64))
    table = ((ascending[1:] + ascending[:-1]) / 2).astype(np.float32)
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
        passed = np.ceil(z * np.float32(STEPS_8)) + np.float32(127)
        codes: npt.NDArray[np.uint8] = np.clip(passed, 0, 255).astype(np.uint8)
    else:
        codes = stored_codes(bits)[np.searchsorted(thresholds(bits), z, side="left")]
    return codes
