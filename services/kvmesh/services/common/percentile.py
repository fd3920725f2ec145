"""Percentiles by the nearest rank: always a value that was seen. Pure."""

from collections.abc import Sequence


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least of ascending values that at least `share` of them, 0 to 1, do not exceed.

    Raises ValueError for no values.
    """
    if not ordered:
        raise ValueError("there are no values, so no percentile")
    # In millionths, so that 0.99 of 100 is the 99th and not, by rounding, the 100th.
    rank = -(-round(len(ordered) * share * 1e6) // 1_000_000)
    return ordered[max(0, rank - 1)]
