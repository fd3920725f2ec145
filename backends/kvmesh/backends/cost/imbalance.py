"""How many tokens, and of how many experts, the busiest rank of an expert-parallel group gets."""

import functools
from bisect import bisect_right

import numpy as np
import numpy.typing as npt

ALPHA = 1.2  # of the power law that AIConfigurator's MoE tables were measured with
_HEAVIEST = 0.8  # most of a step's tokens that one expert draws, before the loads are scaled
_DRAWS = 96
_SEED = 20260
_MOST_TOKENS = 1 << 18


class Routing:
    """Loads of the busiest of `ranks` that share `experts`, by tokens of the whole group."""

    def __init__(self, experts: int, top_k: int, ranks: int, kind: str) -> None:
        self._per_rank = -(-experts // ranks)
        self._share = top_k / ranks
        self._curve = None if kind == "balanced" else _curve(experts, top_k, ranks, kind)

    def busiest(self, tokens: float) -> tuple[float, float]:
        """(assignments, experts used) on the busiest rank, of `tokens` tokens of the group."""
        if tokens <= 0:
            return 0.0, 0.0
        even = max(1.0, tokens * self._share)
        if self._curve is None:
            return even, min(self._per_rank, even)
        at, peaks, used = self._curve
        i = min(max(bisect_right(at, tokens) - 1, 0), len(at) - 2)
        t = min(max((tokens - at[i]) / (at[i + 1] - at[i]), 0.0), 1.0)
        peak = peaks[i] + t * (peaks[i + 1] - peaks[i])
        return max(1.0, peak * tokens * self._share), used[i] + t * (used[i + 1] - used[i])


_Curve = tuple[list[float], list[float], list[float]]


@functools.cache
def _curve(experts: int, top_k: int, ranks: int, kind: str) -> _Curve:
    """(tokens, busiest rank over the mean, experts used there), ascending in tokens.

    Each expert's popularity is drawn from a density ~ x^-ALPHA. power_law: ranks hold consecutive
    experts. placed: experts are placed by popularity, so that ranks have even loads.
    The means of a fixed number of draws with a fixed seed: a constant, not a random number.
    """
    uniform = np.random.default_rng(_SEED).random((_DRAWS, experts))
    at = sorted({round(2 ** (step / 2)) for step in range(2 * _MOST_TOKENS.bit_length() - 1)})
    peaks, used = [], []
    for tokens in at:
        loads = _loads(uniform, tokens, top_k)
        if kind == "placed":
            peaks.append(1.0)
            used.append(float(np.minimum(loads, 1.0).sum(axis=1).mean()) / ranks)
            continue
        padded = np.zeros((_DRAWS, -(-experts // ranks) * ranks))
        padded[:, :experts] = loads
        per_rank = padded.reshape(_DRAWS, ranks, -1)
        sums = per_rank.sum(axis=2)
        busiest = sums.argmax(axis=1)
        rows = np.arange(_DRAWS)
        peaks.append(float((sums[rows, busiest] / (tokens * top_k / ranks)).mean()))
        used.append(float(np.minimum(per_rank[rows, busiest], 1.0).sum(axis=1).mean()))
    return [float(t) for t in at], peaks, used


def _loads(uniform: npt.NDArray[np.float64], tokens: int, top_k: int) -> npt.NDArray[np.float64]:
    """Assignments of each expert, [draws, experts]; a token chooses an expert once at most."""
    experts = uniform.shape[1]
    many = tokens * top_k > experts
    low, high = (1.0, max(2.0, _HEAVIEST * tokens)) if many else (0.01, 2.0)
    power = 1 - ALPHA
    x = ((high**power - low**power) * uniform + low**power) ** (1 / power)
    total = tokens * top_k
    loads = x / x.sum(axis=1, keepdims=True) * total
    for _ in range(8):  # what is above a token per expert goes to the others
        loads = np.minimum(loads, tokens)
        loads *= total / loads.sum(axis=1, keepdims=True)
    capped: npt.NDArray[np.float64] = np.minimum(loads, tokens)
    return capped
