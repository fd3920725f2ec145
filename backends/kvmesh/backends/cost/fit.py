"""Fits what a step costs from the steps that ran: non-negative, and steady under outliers."""

from collections import deque

import numpy as np
import numpy.typing as npt

from kvmesh.backends.base import Estimate, StepShape

_KEPT_STEPS = 128  # of each kind
_PRIOR_WEIGHT = 0.05  # in steps: decides only what the steps seen leave open
_SWEEPS = 100
_LEAST_SECONDS = 1e-12


class StepFit:
    """Learns an Estimate from (shape, seconds) of recent steps. Reads no clock.

    Steps with prefill and steps of decode alone are kept apart, as thousands of decode steps would
    otherwise push out the few that say what prefill costs.
    """

    def __init__(self, prior: Estimate | None = None) -> None:
        self._prior = prior or Estimate()
        self._prefill: deque[tuple[StepShape, float]] = deque(maxlen=_KEPT_STEPS)
        self._decode: deque[tuple[StepShape, float]] = deque(maxlen=_KEPT_STEPS)
        self._fitted: Estimate | None = self._prior

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Adds a step that took `seconds`; not positive ones say nothing and are left out."""
        if seconds <= 0:
            return
        (self._prefill if shape.prefill_tokens else self._decode).append((shape, seconds))
        self._fitted = None

    def estimate(self) -> Estimate:
        """The fit over the steps kept; the prior as long as there are none."""
        if self._fitted is None:
            self._fitted = _fit([*self._prefill, *self._decode], self._prior)
        return self._fitted


def _fit(steps: list[tuple[StepShape, float]], prior: Estimate) -> Estimate:
    seconds = np.array([each for _, each in steps])
    work = np.array([_row(shape) for shape, _ in steps], np.float64)
    start = np.array(
        [prior.base_s, prior.prefill_token_s, prior.decode_token_s, prior.context_token_s]
    )
    start = np.maximum(start, _LEAST_SECONDS)
    # Where the steps leave something open, the prior's proportions decide, not its magnitude.
    start *= np.median(seconds / (work @ start))
    # Relative errors: a short step counts as much as a long one, a stall of any length at most as
    # much as one step. Unknowns are multiples of the prior, so that all are of one magnitude.
    rows = work * start / seconds[:, None]
    gram = rows.T @ rows + _PRIOR_WEIGHT * np.eye(4)
    target = rows.sum(axis=0) + _PRIOR_WEIGHT
    base, prefill, decode, context = (_solve_non_negative(gram, target) * start).tolist()
    return Estimate(base, prefill, decode, context, simulated=False)


def _row(shape: StepShape) -> tuple[int, int, int, int]:
    return 1, shape.prefill_tokens, shape.decode_sequences, shape.context_tokens


def _solve_non_negative(
    gram: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The x >= 0 of least x'Gx / 2 - t'x, by coordinate descent. G is positive definite."""
    solution = np.ones(len(target))
    for _ in range(_SWEEPS):
        for index in range(len(target)):
            gradient = gram[index] @ solution - target[index]
            solution[index] = max(0.0, solution[index] - gradient / gram[index, index])
    return solution
