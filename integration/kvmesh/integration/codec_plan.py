"""Which codec each layer should have: the cheapest assignment under a budget of KL. Pure.

Layers are measured one at a time. To first order their divergences add up, so the cheapest
assignment is a knapsack: minimise the bytes while the sum of the layers' KL stays under a target.
How well the sum predicts the whole is then measured, and the target moved until the whole itself,
not its prediction, is under the budget.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

MAX_ROUNDS = 8  # measurements of whole assignments; more only while none is under the budget
_CLOSE = 0.98  # of the budget: nearer than that is near enough
_FINE = 1.02  # ratio of targets between which no other assignment is looked for


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer under one codec. kl: nats, measured with every other layer in fp16."""

    bytes_per_token: int
    kl: float


Layer = Mapping[str, LayerCost]  # codec -> what it costs
Assignment = tuple[str, ...]  # a codec for each layer


class Measured(Protocol):
    """What a measurement of a whole assignment brings."""

    @property
    def kl_nats(self) -> float: ...


M = TypeVar("M", bound=Measured)
_Chain = tuple[str, "_Chain"] | None  # an assignment from its last layer to its first


def total_bytes(layers: Sequence[Layer], assignment: Assignment) -> int:
    return sum(each[name].bytes_per_token for each, name in zip(layers, assignment, strict=True))


def predicted_kl(layers: Sequence[Layer], assignment: Assignment) -> float:
    return sum(each[name].kl for each, name in zip(layers, assignment, strict=True))


def cheapest(layers: Sequence[Layer], target: float) -> Assignment:
    """The fewest bytes whose KL sums up to at most `target`; among equals the least KL.

    Exact: a table over the bytes that are possible, of which there are few, as codecs have few
    widths. If nothing is under the target, the assignment of the least KL.
    """
    # bytes -> (least KL, the assignment as a chain of (codec, rest))
    best: dict[int, tuple[float, _Chain]] = {0: (0.0, None)}
    for layer in layers:
        grown: dict[int, tuple[float, _Chain]] = {}
        for size, (kl, chain) in best.items():
            for codec, cost in layer.items():
                key, value = size + cost.bytes_per_token, kl + cost.kl
                if key not in grown or value < grown[key][0]:
                    grown[key] = (value, (codec, chain))
        best = grown
    under = [size for size, (kl, _) in best.items() if kl <= target]
    if under:
        return _unchain(best[min(under)][1])
    return _unchain(min(best.values(), key=lambda item: item[0])[1])


def _unchain(chain: _Chain) -> Assignment:
    names: list[str] = []
    while chain is not None:
        name, chain = chain
        names.append(name)
    return tuple(reversed(names))


def search(
    layers: Sequence[Layer],
    budget: float,
    measure: Callable[[Assignment], M],
    known: Mapping[Assignment, M],
) -> tuple[Assignment, M]:
    """The cheapest assignment found whose measured KL is at most `budget` nats.

    measure: runs the model with an assignment. known: assignments that were measured before.
    Every layer needs a codec that loses nothing (fp16), so that there is always an answer; raises
    ValueError if even the least lossy assignment is over the budget.
    """
    seen = dict(known)
    low: float | None = None  # a target whose assignment was under the budget, and one that was not
    high: float | None = None
    target = budget
    smallest = cheapest(layers, math.inf)
    while True:
        assignment = cheapest(layers, target)
        if assignment not in seen:
            seen[assignment] = measure(assignment)
        kl = seen[assignment].kl_nats
        if kl <= budget:
            low = target
        else:
            high = target
        if low is None and predicted_kl(layers, assignment) <= 0:
            break  # nothing loses less
        if low is not None and (
            assignment == smallest
            or len(seen) - len(known) >= MAX_ROUNDS
            or _CLOSE * budget <= kl <= budget
            or _is_narrow(low, high)
        ):
            break
        target = _next_target(target, budget / kl if kl else 2.0, low, high)
    return _best(layers, budget, seen)


def _is_narrow(low: float, high: float | None) -> bool:
    return low == 0 or (high is not None and high / low < _FINE)


def _next_target(target: float, ratio: float, low: float | None, high: float | None) -> float:
    """Towards the budget by how far the measurement was off, then by bisection."""
    if low is not None and high is not None:
        return float((low * high) ** 0.5)
    if low is None:
        shrunk = target * min(ratio, 0.8)
        return shrunk if shrunk > 1e-12 else 0.0
    return target * min(max(ratio, 1.1), 4.0)


def _best(
    layers: Sequence[Layer], budget: float, seen: Mapping[Assignment, M]
) -> tuple[Assignment, M]:
    fitting = [(a, m) for a, m in seen.items() if m.kl_nats <= budget]
    if not fitting:
        least = min(m.kl_nats for m in seen.values())
        raise ValueError(f"the least lossy assignment has a KL of {least:.3g}, over {budget:g}")
    return min(fitting, key=lambda pair: (total_bytes(layers, pair[0]), pair[1].kl_nats))
