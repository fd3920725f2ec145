"""Bootstrap intervals beside the textbook's."""

import numpy as np
import pytest

from kvmesh.integration.estimate import median_of, percent_more


def test_a_median_lies_in_its_interval_which_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(7).normal(3.0, 1.0, 400)
    found = median_of(values.tolist())
    assert found.value == pytest.approx(float(np.median(values)), abs=1e-3)
    assert found.low < found.value < found.high
    # The median of n normal values has the standard error 1.2533 / sqrt(n).
    assert found.high - found.low == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.35)


def test_pairs_that_drift_together_give_a_narrow_interval() -> None:
    base = np.linspace(1.0, 9.0, 50)
    found = percent_more(base.tolist(), (1.1 * base).tolist())
    assert (found.value, found.low, found.high) == (10.0, 10.0, 10.0)


def test_one_value_has_no_width_and_none_is_refused() -> None:
    assert median_of([2.0]).low == median_of([2.0]).high == 2.0
    with pytest.raises(ValueError, match="no measurements"):
        median_of([])
