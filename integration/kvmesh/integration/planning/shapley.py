"""What each of several changes contributes to a ratio that they make together.

The worth of a set of changes is measured with just those switched on. A change's factor depends on
what is on already; its mean over all orders (the Shapley value, here of logarithms) is the only
fair split whose factors multiply to the whole.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

MOST_CHANGES = 8
Worth = Callable[[frozenset[str]], float]
Order = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contribution:
    """factor: mean over the orders, geometric. low, high: of any order."""

    name: str
    factor: float
    low: float
    high: float


def orders_of(names: Sequence[str], most: int | None, seed: int) -> list[Order]:
    """All orders, or `most` of them: at random, each with its reverse, so that what is early in one
    is late in another.

    Raises ValueError for more than MOST_CHANGES names or most below 1.
    """
    if len(names) > MOST_CHANGES:
        raise ValueError(f"{len(names)} changes, must be at most {MOST_CHANGES}")
    if most is not None and most < 1:
        raise ValueError(f"orders is {most}, must be at least 1")
    if most is None or most >= math.factorial(len(names)):
        return list(permutations(names))
    rng = random.Random(seed)
    orders: dict[Order, None] = {}
    while len(orders) < most:
        order = tuple(rng.sample(names, len(names)))
        orders[order] = None
        orders[order[::-1]] = None
    return list(orders)[:most]


def sets_of(orders: Sequence[Order]) -> list[frozenset[str]]:
    """Every set that some order passes, smaller ones first."""
    found = {frozenset(order[:n]): None for order in orders for n in range(len(order) + 1)}
    return sorted(found, key=lambda on: (len(on), sorted(on)))


def contributions(orders: Sequence[Order], worth: Worth) -> list[Contribution]:
    """One for each name. `worth` is asked once for each set, and must be positive.

    Raises ValueError for a worth that is not.
    """
    logs: dict[frozenset[str], float] = {}
    for on in sets_of(orders):
        value = worth(on)
        if not value > 0:
            raise ValueError(f"the worth of {sorted(on)} is {value}, must be greater than 0")
        logs[on] = math.log(value)
    gains: dict[str, list[float]] = {}
    for order in orders:
        for place, name in enumerate(order):
            before = frozenset(order[:place])
            gains.setdefault(name, []).append(logs[before | {name}] - logs[before])
    return [
        Contribution(
            name, math.exp(math.fsum(each) / len(each)), math.exp(min(each)), math.exp(max(each))
        )
        for name, each in gains.items()
    ]
