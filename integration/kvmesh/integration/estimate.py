"""A figure of repeated measurements with its 95 % interval, by the bootstrap (Efron 1979)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LOW, HIGH = 2.5, 97.5  # percentiles of the resampled figures
SEED = 1

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """low, high: what 95 % of resamples lie between; as far apart as few measurements leave it."""

    value: float
    low: float
    high: float


def median_of(values: Sequence[float]) -> Estimate:
    """Raises ValueError for no values."""
    return _estimate(np.asarray(values)[:, None], lambda s: np.median(s[..., 0], axis=-1))


def percent_more(base: Sequence[float], other: Sequence[float]) -> Estimate:
    """How much larger the sum of `other` is than that of `base`; resampled in pairs."""
    pairs = np.stack([np.asarray(base), np.asarray(other)], axis=-1)

    def figure(samples: Values) -> Values:
        sums = samples.sum(axis=-2)
        more: Values = 100.0 * (sums[..., 1] / sums[..., 0] - 1.0)
        return more

    return _estimate(pairs, figure)


def _estimate(rows: Values, figure: Callable[[Values], Values]) -> Estimate:
    """rows: float64 [measurements, columns]; figure: of [..., measurements, columns]."""
    if not len(rows):
        raise ValueError("no measurements")
    picks = np.random.default_rng(SEED).integers(len(rows), size=(RESAMPLES, len(rows)))
    low, high = np.percentile(figure(rows[picks]), (LOW, HIGH))
    return Estimate(*(round(float(v), 3) for v in (figure(rows), low, high)))
