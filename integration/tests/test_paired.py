"""The interval of a paired difference, against simulated answers and known bounds."""

import random

import pytest

from kvmesh.integration.paired import paired_difference, wilson


def test_wilson_is_the_published_interval() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, at 95 %."""
    for count, cases, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(count, cases, 1.959964) == pytest.approx((low, high), abs=1e-4)


def test_answers_alike_leave_only_the_chance_of_the_unseen() -> None:
    same = paired_difference([1.0] * 597 + [0.0] * 3, [1.0] * 597 + [0.0] * 3)
    assert (same.lost, same.won, same.mean) == (0, 0, 0)
    assert same.low == -same.high and 0.008 < same.high < 0.009
    worse = paired_difference([1.0] * 90 + [0.0] * 10, [0.0] * 20 + [1.0] * 75 + [0.0] * 5)
    assert (worse.lost, worse.won) == (20, 5)
    assert worse.mean == pytest.approx(-0.15)
    assert worse.low < -0.15 < worse.high < 0


def test_the_interval_holds_the_truth_in_at_least_95_of_100_cases() -> None:
    rng = random.Random(7)
    hits, trials = 0, 1000
    for _ in range(trials):
        pairs = [
            (1.0, 0.0) if draw < 0.03 else (0.0, 1.0) if draw < 0.04 else (1.0, 1.0)
            for draw in (rng.random() for _ in range(300))
        ]
        found = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
        hits += found.low <= 0.01 - 0.03 <= found.high
    assert hits >= 0.95 * trials


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [([], [], "above 0"), ([1.0], [1.0, 0.0], "1 and 2 answers"), ([0.5], [1.0], "between 0 and")],
)
def test_what_is_no_pair_of_answers_is_refused(
    first: list[float], second: list[float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        paired_difference(first, second)
