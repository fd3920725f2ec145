"""The fit of step times, on steps made from a known truth."""

import numpy as np
import pytest

from kvmesh.backends.base import Estimate, StepShape
from kvmesh.backends.cost.fit import StepFit

TRUTH = Estimate(base_s=3e-4, prefill_token_s=5e-5, decode_token_s=8e-5, context_token_s=2e-8)


def shapes(count: int, seed: int = 0) -> list[StepShape]:
    rng = np.random.default_rng(seed)
    return [
        StepShape(
            int(rng.integers(0, 2) * rng.integers(1, 512)),
            int(rng.integers(0, 64)),
            int(rng.integers(0, 100_000)),
        )
        for _ in range(count)
    ]


def error(fit: StepFit) -> float:
    estimate = fit.estimate()
    return max(
        abs(estimate.seconds(shape) / TRUTH.seconds(shape) - 1) for shape in shapes(200, seed=1)
    )


def test_prior_until_a_step_is_seen():
    assert StepFit(TRUTH).estimate() is TRUTH
    assert StepFit().estimate() == Estimate()


def test_finds_the_truth():
    fit = StepFit()
    for shape in shapes(200):
        fit.observe(shape, TRUTH.seconds(shape))
    assert error(fit) < 0.05
    assert not fit.estimate().simulated


def test_a_prior_that_is_far_off_does_not_hold_it_back():
    fit = StepFit(Estimate(1e-2, 1e-6, 1e-3, 1e-9))
    for shape in shapes(200):
        fit.observe(shape, TRUTH.seconds(shape))
    assert error(fit) < 0.05


def test_noise_and_stalls_do_not_carry_it_away():
    fit, rng = StepFit(), np.random.default_rng(2)
    for index, shape in enumerate(shapes(400)):
        stall = 100.0 if index % 20 == 0 else 1.0
        fit.observe(shape, TRUTH.seconds(shape) * rng.uniform(0.9, 1.1) * stall)
    assert error(fit) < 0.3


def test_the_mean_is_not_drawn_to_short_steps_nor_to_stalls():
    rng, decode = np.random.default_rng(3), StepShape(decode_sequences=1, context_tokens=100)
    noise = rng.lognormal(0.0, 0.5, 400)
    noise[::50] = 200.0
    mean, nearest = StepFit(kept=400, mean=True), StepFit(kept=400)
    for each in noise:
        for fit in (mean, nearest):
            fit.observe(decode, each * TRUTH.seconds(decode))
    expected = TRUTH.seconds(decode) * np.exp(0.125)  # of a log-normal with sigma 0.5
    assert mean.estimate().seconds(decode) == pytest.approx(expected, rel=0.15)
    assert nearest.estimate().seconds(decode) < 0.85 * expected


def test_many_steps_of_one_kind_do_not_push_out_the_others():
    fit = StepFit()
    for shape in shapes(100):
        fit.observe(shape, TRUTH.seconds(shape))
    decode = StepShape(decode_sequences=4, context_tokens=2000)
    for _ in range(5000):
        fit.observe(decode, TRUTH.seconds(decode))
    assert error(fit) < 0.1


def test_follows_a_machine_that_became_slower():
    fit, decode = StepFit(), StepShape(decode_sequences=1, context_tokens=100)
    for scale in (1.0, 3.0):
        for _ in range(50):
            fit.observe(decode, scale * TRUTH.seconds(decode))
    assert fit.estimate().seconds(decode) == pytest.approx(3 * TRUTH.seconds(decode), rel=0.05)


def test_never_negative_and_deaf_to_times_that_cannot_be():
    fit = StepFit()
    fit.observe(StepShape(decode_sequences=1), 0.0)
    fit.observe(StepShape(decode_sequences=1), -1.0)
    assert fit.estimate() == Estimate()
    for tokens in (1, 10, 100):
        fit.observe(StepShape(prefill_tokens=tokens, context_tokens=tokens**2), 1.0 / tokens)
    estimate = fit.estimate()
    assert min(estimate.base_s, estimate.prefill_token_s, estimate.context_token_s) >= 0
