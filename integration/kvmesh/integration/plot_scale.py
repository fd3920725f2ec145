"""From numbers to places on an axis: bounds, ticks and their names. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Axis:
    """How numbers are laid out. low, high: None takes them from the data.

    kind: log2 has its ticks at powers of two, as context lengths want, log at powers of ten.
    """

    label: str
    kind: Literal["linear", "log", "log2"] = "linear"
    low: float | None = None
    high: float | None = None

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (self.kind == "linear" or value > 0)


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis that knows its bounds and where on the page they are."""

    axis: Axis
    low: float
    high: float
    start: float  # pixels, of `low`
    end: float  # pixels, of `high`
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Pixels; values beyond the bounds are put on them."""
        low, high, at = (_along(self.axis, v) for v in (self.low, self.high, value))
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)


def fit_scale(axis: Axis, values: Sequence[float], start: float, end: float) -> Scale:
    """A scale that holds all `values`, which `axis` can show.

    Raises ValueError for a bound that a logarithmic axis cannot show, or bounds out of order.
    """
    for bound in (axis.low, axis.high):
        if bound is not None and not axis.shows(bound):
            raise ValueError(f"axis {axis.label!r} is logarithmic, its bound {bound} must be > 0")
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if low > high:
        raise ValueError(f"axis {axis.label!r} has bounds {low}..{high}, out of order")
    if axis.kind == "linear":
        low, high, ticks = _linear(axis, low, high)
    else:
        low, high, ticks = _logarithmic(axis, low, high)
    return Scale(axis, low, high, start, end, tuple((t, format_number(t)) for t in ticks))


def _along(axis: Axis, value: float) -> float:
    return value if axis.kind == "linear" else math.log(value)


def _linear(axis: Axis, low: float, high: float) -> tuple[float, float, list[float]]:
    """Bounds not given are widened to ticks; steps are 1, 2 or 5 times a power of ten."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9) if axis.low is None else math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9) if axis.high is None else math.floor(high / step + 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    return (
        ticks[0] if axis.low is None else low,
        ticks[-1] if axis.high is None else high,
        ticks,
    )


def _logarithmic(axis: Axis, low: float, high: float) -> tuple[float, float, list[float]]:
    """Ticks at powers of the base, thinned to at most eight; finer ones within one decade."""
    base = 2 if axis.kind == "log2" else 10
    if low == high:
        low, high = low / base, high * base
    first = math.floor(math.log(low, base) + 1e-9)
    last = math.ceil(math.log(high, base) - 1e-9)
    stride = max(1, math.ceil((last - first) / 8))
    powers = [float(base) ** power for power in range(first, last + 1, stride)]
    if base == 10 and last - first <= 3:
        powers = sorted(m * p for p in powers for m in (1, 2, 5))
    inside = [p for p in powers if low * 0.999 <= p <= high * 1.001]
    if len(inside) >= 2:
        return low, high, inside
    low = float(base) ** first if axis.low is None else low
    high = float(base) ** last if axis.high is None else high
    return low, high, [p for p in powers if low * 0.999 <= p <= high * 1.001]


def format_number(value: float) -> str:
    """Short, for people: 0.25, 1,024, 64k, 2e-07."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1 << 13 and value % 1024 == 0:
        return f"{value / 1024:,.0f}k"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
