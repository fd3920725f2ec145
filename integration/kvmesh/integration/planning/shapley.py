"""What each of several changes contributes to a ratio that they make together.

The worth of a set of changes is measured with just those switched on. A change's factor depends on
what is on already; its mean over all orders (the Shapley value, here of logarithms) is the only fair
split whose factors multiply to the whole.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

MOST_CHANGES = 10
Worth = Callable[[frozenset[str]], float]


@dataclass(frozen=True, slots=True)
class Contribution:
    """factor: mean over all orders, geometric. low, high: of any order."""

    name: str
    factor: float
    low: float
    high: float


def subsets(names: Sequence[str]) -> list[frozenset[str]]:
    """All 2^n, smaller ones first."""
    sizes = range(len(names) + 1)
    return [frozenset(each) for size in sizes for each in combinations(names, size)]


def contributions(names: Sequence[str], worth: Worth) -> list[Contribution]:
    """One for each name, in order. `worth` is called once for each subset, and must be positive.

    Raises ValueError for more than MOST_CHANGES names or a worth that is not positive.
    """
    if len(names) > MOST_CHANGES:
        raise ValueError(f"{len(names)} changes, must be at most {MOST_CHANGES}")
    logs: dict[frozenset[str], float] = {}
    for subset in subsets(names):
        value = worth(subset)
        if not value > 0:
            raise ValueError(f"the worth of {sorted(subset)} is {value}, must be greater than 0")
        logs[subset] = math.log(value)
    return [_contribution(name, names, logs) for name in names]


def _contribution(
    name: str, names: Sequence[str], logs: dict[frozenset[str], float]
) -> Contribution:
    others = [other for other in names if other != name]
    mean, low, high = 0.0, math.inf, -math.inf
    for subset in subsets(others):
        gain = logs[subset | {name}] - logs[subset]
        # Orders in which exactly `subset` comes before: |S|! (n - |S| - 1)! of n!.
        size = len(subset)
        orders = math.factorial(size) * math.factorial(len(others) - size)
        mean += gain * orders / math.factorial(len(names))
        low, high = min(low, gain), max(high, gain)
    return Contribution(name, math.exp(mean), math.exp(low), math.exp(high))
