"""Fits what a step costs from the steps that ran: non-negative, and steady under outliers."""

from collections import OrderedDict, deque

import numpy as np
import numpy.typing as npt

from kvmesh.backends.base import Estimate, StepShape

KEPT_STEPS = 8  # of each kind
_KEPT_KINDS = 128
_PRIOR_WEIGHT = 1e-3  # relative to the steps: decides only what they leave open
_UNSEEN_WEIGHT = 1e-9  # holds an unknown that no step touched at the prior
_LEAST_SECONDS = 1e-12
_ROUNDS = 4  # of weighing again
_STALL = 1.0  # off by more than this share of what was expected, a step pulls no harder

_Kind = tuple[int, int, int]
_Floats = npt.NDArray[np.float64]


class StepFit:
    """Learns an Estimate from (shape, seconds) of recent steps. Reads no clock.

    Steps are kept by kind: the magnitudes, in powers of two, of what they prefill, decode and
    attend to. Otherwise thousands of steps of one size would push out the few that say what others
    cost. Of the kinds, those seen last are kept.

    kept: steps of each kind. mean: what steps take on average, which over many of them is what
    counts; else what is nearest to each in relative terms, which noise draws to the short ones.
    """

    def __init__(
        self, prior: Estimate | None = None, kept: int = KEPT_STEPS, mean: bool = False
    ) -> None:
        self._prior = prior or Estimate()
        self._kept = kept
        self._mean = mean
        self._kinds: OrderedDict[_Kind, deque[tuple[StepShape, float]]] = OrderedDict()
        self._fitted: Estimate | None = self._prior

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Adds a step that took `seconds`; not positive ones say nothing and are left out."""
        if seconds <= 0:
            return
        kind = _kind(shape)
        self._kinds.setdefault(kind, deque(maxlen=self._kept)).append((shape, seconds))
        self._kinds.move_to_end(kind)
        if len(self._kinds) > _KEPT_KINDS:
            self._kinds.popitem(last=False)
        self._fitted = None

    def estimate(self) -> Estimate:
        """The fit over the steps kept; the prior as long as there are none."""
        if self._fitted is None:
            self._fitted = _fit(
                [step for kind in self._kinds.values() for step in kind], self._prior, self._mean
            )
        return self._fitted


def _kind(shape: StepShape) -> _Kind:
    return (
        shape.prefill_tokens.bit_length(),
        shape.decode_sequences.bit_length(),
        shape.context_tokens.bit_length(),
    )


def _fit(steps: list[tuple[StepShape, float]], prior: Estimate, mean: bool) -> Estimate:
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
    found = _solved(work * start, seconds, 1 / seconds)
    for _ in range(_ROUNDS if mean else 0):
        # Relative to what is expected of a step, not to what it took: its noise is in the latter.
        expected = np.maximum((work * start) @ found, _LEAST_SECONDS)
        off = np.abs(seconds / expected - 1)
        weights = np.sqrt(np.minimum(1.0, _STALL / np.maximum(off, _LEAST_SECONDS))) / expected
        found = _solved(work * start, seconds, weights)
    base, prefill, decode, context = (found * start).tolist()
    return Estimate(base, prefill, decode, context, simulated=False)


def _solved(work: _Floats, seconds: _Floats, weights: _Floats) -> _Floats:
    """The x >= 0 of least weighted squares of work @ x - seconds, held to 1 where work is open."""
    rows = work * weights[:, None]
    gram = rows.T @ rows
    pull = _PRIOR_WEIGHT * np.diag(gram) + _UNSEEN_WEIGHT
    return _solve_non_negative(
        gram + np.diag(pull), (rows * (weights * seconds)[:, None]).sum(axis=0) + pull
    )


def _row(shape: StepShape) -> tuple[int, int, int, int]:
    return 1, shape.prefill_tokens, shape.decode_sequences, shape.context_tokens


def _solve_non_negative(gram: _Floats, target: _Floats) -> _Floats:
    """The x >= 0 of least x'Gx / 2 - t'x, for a positive definite G of a few rows.

    Solves for each choice of unknowns that are not zero; the best valid one is the answer.
    """
    size = len(target)
    best, least = np.zeros(size), 0.0
    for chosen in range(1, 1 << size):
        index = [each for each in range(size) if chosen >> each & 1]
        part = np.linalg.solve(gram[np.ix_(index, index)], target[index])
        value = -0.5 * float(target[index] @ part)
        if value < least and (part >= 0).all():
            best, least = np.zeros(size), value
            best[index] = part
    return best
