"""The choice of codecs by layer, against every assignment there is, and against models that do not
add up as the plan supposes."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.integration.codec_plan import (
    MAX_ROUNDS,
    Assignment,
    Layer,
    LayerCost,
    cheapest,
    predicted_kl,
    search,
    total_bytes,
)

SIZES = {"fp16": 32, "k8v8": 17, "k4v4": 9, "k2v2": 5}


@dataclass(frozen=True)
class Found:
    kl_nats: float


def layer(*kl: float) -> Layer:
    costs = zip(SIZES.items(), (0.0, *kl), strict=True)
    return {name: LayerCost(size, loss) for (name, size), loss in costs}


losses = st.floats(0, 1, allow_nan=False).map(lambda x: round(x, 4))
layers_of = st.lists(st.builds(layer, losses, losses, losses), min_size=1, max_size=4)


def every(layers: list[Layer]) -> list[Assignment]:
    return list(itertools.product(*layers))


@given(layers_of, st.floats(0, 3))
@settings(deadline=None)
def test_cheapest_is_the_best_of_all_assignments(layers: list[Layer], target: float) -> None:
    found = cheapest(layers, target)
    fitting = [a for a in every(layers) if predicted_kl(layers, a) <= target]
    assert predicted_kl(layers, found) <= target + 1e-12
    assert total_bytes(layers, found) <= min(total_bytes(layers, a) for a in fitting)


def test_cheapest_gives_the_least_loss_if_nothing_fits() -> None:
    layers = [{"k4v4": LayerCost(9, 0.5), "k2v2": LayerCost(5, 0.9)}] * 2
    assert cheapest(layers, 0.1) == ("k4v4", "k4v4")


@given(layers_of, st.floats(0.01, 2), st.floats(0.2, 5), st.floats(0.6, 1.6))
@settings(deadline=None)
def test_what_is_chosen_is_measured_and_under_the_budget(
    layers: list[Layer], budget: float, factor: float, power: float
) -> None:
    """The whole loses factor * sum ** power: the sum of the layers is only a guess."""
    measured: dict[Assignment, Found] = {}

    def measure(assignment: Assignment) -> Found:
        assert assignment not in measured, "measured twice"
        found = Found(factor * predicted_kl(layers, assignment) ** power)
        measured[assignment] = found
        return found

    assignment, found = search(layers, budget, measure, {})
    assert measured[assignment] is found
    assert found.kl_nats <= budget
    over = sum(m.kl_nats > budget for m in measured.values())
    assert len(measured) <= MAX_ROUNDS + over


def run(measure: Callable[[Assignment], Found], known: dict[Assignment, Found]) -> Assignment:
    layers = [layer(0.001, 0.01, 0.1)] * 4
    return search(layers, 0.04, measure, known)[0]


def test_a_model_that_loses_more_than_the_sum_is_repaired() -> None:
    layers = [layer(0.001, 0.01, 0.1)] * 4
    chosen = run(lambda a: Found(2 * predicted_kl(layers, a)), {})
    assert 2 * predicted_kl(layers, chosen) <= 0.04
    # Two layers of k4v4 would lose 2 * (2 * 0.01 + 2 * 0.001) = 0.044.
    assert total_bytes(layers, chosen) == 9 + 3 * 17


def test_a_model_that_loses_less_than_the_sum_gets_fewer_bytes() -> None:
    layers = [layer(0.001, 0.01, 0.1)] * 4
    chosen = run(lambda a: Found(0.1 * predicted_kl(layers, a)), {})
    assert total_bytes(layers, chosen) < 4 * 9
    assert 0.1 * predicted_kl(layers, chosen) <= 0.04


def test_a_known_assignment_that_fits_and_is_cheaper_wins() -> None:
    known = {("k2v2",) * 4: Found(0.03)}
    assert (
        run(lambda a: Found(predicted_kl([layer(0.001, 0.01, 0.1)] * 4, a)), known) == ("k2v2",) * 4
    )


def test_a_budget_that_nothing_meets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has a KL of 0\.5, over 0\.04"):
        run(lambda _: Found(0.5), {})
