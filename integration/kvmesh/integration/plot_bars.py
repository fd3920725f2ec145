"""A plot of bars that start where the one before ended, as SVG text. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.integration.plot_scale import Axis, Scale, fit_scale
from kvmesh.integration.plots import COLORS, svg_page, svg_text

_ROW, _TOP, _CHAR = 30, 50, 6.6


@dataclass(frozen=True, slots=True)
class Bar:
    """From start to end; whisker: (low, high) around the end. total: a bar that stands for all
    before it, drawn from the axis."""

    name: str
    start: float
    end: float
    value: str
    whisker: tuple[float, float] | None = None
    total: bool = False


@dataclass(frozen=True, slots=True)
class BarPlot:
    """Bars from top to bottom over one horizontal axis."""

    title: str
    x: Axis
    bars: Sequence[Bar]
    note: str = ""
    width: int = 860


def bar_plot(plot: BarPlot) -> str:
    """Raises ValueError without bars, or if the axis cannot show one of them."""
    ends = [value for bar in plot.bars for value in (bar.start, bar.end, *(bar.whisker or ()))]
    if not ends or not all(plot.x.shows(value) for value in ends):
        raise ValueError(f"plot {plot.title!r} has no bar, or one that its axis cannot show")
    left = 24 + max(len(bar.name) for bar in plot.bars) * _CHAR
    right = plot.width - 30 - max(len(bar.value) for bar in plot.bars) * _CHAR
    bottom = _TOP + _ROW * len(plot.bars)
    x = fit_scale(plot.x, ends, left, right)
    parts = [_grid(x, bottom)]
    parts += [_bar(bar, _TOP + _ROW * row, x, right) for row, bar in enumerate(plot.bars)]
    parts.append(svg_text((left + right) / 2, bottom + 40, plot.x.label))
    return svg_page(plot.width, math.ceil(bottom + 70), plot.title, plot.note, parts)


def _grid(x: Scale, bottom: float) -> str:
    parts = []
    for value, name in x.ticks:
        at = x.place(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{bottom:.1f}"/>')
        parts.append(svg_text(at, bottom + 18, name))
    return "\n".join(parts)


def _bar(bar: Bar, top: float, x: Scale, right: float) -> str:
    begin = x.start if bar.total else x.place(bar.start)
    first, last = sorted((begin, x.place(bar.end)))
    color = COLORS[6] if bar.total else COLORS[2] if bar.end >= bar.start else COLORS[1]
    shape = f'x="{first:.1f}" y="{top + 5:.1f}" width="{max(last - first, 1):.1f}"'
    middle = top + _ROW / 2
    parts = [
        svg_text(x.start - 8, middle + 4, bar.name, "end"),
        f'<rect {shape} height="{_ROW - 10}" fill="{color}"/>',
        svg_text(right + 8, middle + 4, bar.value, "start"),
    ]
    if bar.whisker is not None:
        low, high = (x.place(value) for value in bar.whisker)
        line = f"M{low:.1f} {middle - 4:.1f}v8m0 -4H{high:.1f}m0 -4v8"
        parts.append(f'<path class="frame" d="{line}"/>')
    return "\n".join(parts)
