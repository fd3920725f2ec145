"""Percentiles against NumPy's inverted distribution function."""

import numpy as np
import pytest

from kvmesh.services.common.percentile import percentile


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 1000])
def test_nearest_rank(count: int) -> None:
    values = np.sort(np.random.default_rng(count).random(count))
    for share in (0.0, 0.01, 0.5, 0.9, 0.95, 0.99, 1.0):
        expected = np.quantile(values, share, method="inverted_cdf")
        assert percentile(values.tolist(), share) == expected, f"p{share} of {count}"


def test_no_values() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
