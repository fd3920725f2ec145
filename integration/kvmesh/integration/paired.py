"""Is one codec worse than another, or was it chance? Both answered the same questions. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of one bound on one count. Two of them make each end of the interval, so each may fail in 1.25 %
# of the cases: 5 % in all, by Bonferroni's inequality, however the counts depend on each other.
_Z = 2.2414


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two shares of right answers, the second's minus the first's.

    lost, won: questions that only the first, and only the second, answered right. low, high: a
    95 % interval of the difference.
    """

    cases: int
    lost: int
    won: int
    low: float
    high: float

    @property
    def mean(self) -> float:
        return (self.won - self.lost) / self.cases


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """first, second: 1 for a right answer and 0 for a wrong one, question by question.

    Questions that both answer alike say nothing, so the interval is that of what they lose and win
    (as in McNemar's test), each bounded by Wilson's interval (1927). Raises ValueError for no
    questions, other numbers of them, or scores between right and wrong.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers, must be the same and above 0")
    if not {*first, *second} <= {0.0, 1.0}:
        raise ValueError("scores between 0 and 1 are not right or wrong")
    lost = sum(a > b for a, b in zip(first, second, strict=True))
    won = sum(a < b for a, b in zip(first, second, strict=True))
    least_lost, most_lost = wilson(lost, len(first))
    least_won, most_won = wilson(won, len(first))
    return Difference(len(first), lost, won, least_won - most_lost, most_won - least_lost)


def wilson(count: int, cases: int, z: float = _Z) -> tuple[float, float]:
    """Bounds of the share behind `count` of `cases`, each missed by the normal tail beyond z."""
    share, weight = count / cases, z * z / cases
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight)
    low = max(middle - half, 0.0) if count else 0.0
    high = min(middle + half, 1.0) if count < cases else 1.0
    return low, high
