"""Plots as SVG text: lines over linear or logarithmic axes, and heat maps. Pure functions.

An SVG is text, so it lives in git and needs no library. It brings its own background, and follows
the reader's light or dark scheme, so it can be read on any page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from kvmesh.integration.plot_scale import Axis, Scale, fit_scale, format_number

# Okabe and Ito's palette, which colour-blind readers can tell apart; yellow and black, which a
# white or a dark page would swallow, are left out.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a8a8a")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")  # a second sign, for print and beyond seven lines
_HEIGHT, _MARGIN = 380, 64
_CHAR = 6.6  # mean width of a character at 12 px
# A dark blue to a bright yellow, evenly rising in lightness (five stops of viridis).
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

_STYLE = """\
text{font:12px system-ui,sans-serif;fill:#333}
.title{font-size:15px;font-weight:600}
.page{fill:#fff}
.grid{stroke:#888;stroke-opacity:.4;stroke-width:.6}
.frame{fill:none;stroke:#888}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.empty{fill:#888;fill-opacity:.2}
@media(prefers-color-scheme:dark){text{fill:#ddd}.page{fill:#161b22}}
text.on-dark{fill:#fff}text.on-light{fill:#111}"""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. points: (x, y) in drawing order; NaN and infinite ones break the line."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class LinePlot:
    """Several curves over one pair of axes, with a legend if there is more than one."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    note: str = ""  # below the plot: where the figures come from
    width: int = 720


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A table of numbers as colours.

    values: one row per entry of `rows`, one number per entry of `columns`; None where nothing was
    measured. low, high: the ends of the colour scale; numbers beyond take the end's colour.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    column_label: str = ""
    row_label: str = ""
    low: float = 0.0
    high: float = 1.0
    show: Callable[[float], str] = format_number
    note: str = ""


def line_plot(plot: LinePlot) -> str:
    """Raises ValueError if no point can be drawn, or an axis is logarithmic and a bound is not
    above zero. Points that a logarithmic axis cannot show are left out."""
    points = [p for line in plot.lines for p in line.points if _drawable(p, plot)]
    if not points:
        raise ValueError(f"plot {plot.title!r} has no point to draw")
    legend = [line.name for line in plot.lines] if len(plot.lines) > 1 else []
    legend_width = 48 + max((len(name) for name in legend), default=-4) * _CHAR
    box = _Box(_MARGIN + 6, 44, plot.width - _MARGIN - 24 - legend_width, _HEIGHT - 44 - _MARGIN)
    x = fit_scale(plot.x, [p[0] for p in points], box.left, box.right)
    y = fit_scale(plot.y, [p[1] for p in points], box.bottom, box.top)
    parts = [_grid(box, x, y)]
    for index, line in enumerate(plot.lines):
        parts.append(_curve(line, index, plot, (x, y)))
    parts += [_legend_entry(name, i, plot, box) for i, name in enumerate(legend)]
    parts.append(_labels(plot.x.label, plot.y.label, box))
    return svg_page(plot.width, _HEIGHT, plot.title, plot.note, parts)


def heat_map(plot: HeatMap) -> str:
    """Raises ValueError if `values` has not one row per name and one number per column."""
    if not plot.rows or not plot.columns:
        raise ValueError(f"heat map {plot.title!r} has no cells")
    if [len(row) for row in plot.values] != [len(plot.columns)] * len(plot.rows):
        raise ValueError(
            f"heat map {plot.title!r} needs {len(plot.rows)} rows of {len(plot.columns)} values"
        )
    left = 44 + max(len(name) for name in plot.rows) * _CHAR
    cell_width = max(56.0, max(len(name) for name in plot.columns) * _CHAR + 10)
    cell_height = 30.0
    box = _Box(left, 44, cell_width * len(plot.columns), cell_height * len(plot.rows))
    parts = []
    for row, (name, values) in enumerate(zip(plot.rows, plot.values, strict=True)):
        y = box.top + row * cell_height
        parts.append(svg_text(box.left - 8, y + cell_height / 2 + 4, name, "end"))
        for column, value in enumerate(values):
            parts.append(
                _cell(box.left + column * cell_width, y, (cell_width, cell_height), value, plot)
            )
    for column, name in enumerate(plot.columns):
        parts.append(svg_text(box.left + (column + 0.5) * cell_width, box.bottom + 18, name))
    parts.append(_labels(plot.column_label, plot.row_label, box))
    width = max(box.right + 24, len(plot.title) * 8.5 + 32, len(plot.note) * _CHAR + 32)
    return svg_page(math.ceil(width), math.ceil(box.bottom + _MARGIN), plot.title, plot.note, parts)


@dataclass(frozen=True, slots=True)
class _Box:
    """Where the data goes, in pixels from the upper left corner."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


def _drawable(point: tuple[float, float], plot: LinePlot) -> bool:
    return plot.x.shows(point[0]) and plot.y.shows(point[1])


def _grid(box: _Box, x: Scale, y: Scale) -> str:
    parts = []
    for value, name in x.ticks:
        at = x.place(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {box.top:.1f}V{box.bottom:.1f}"/>')
        parts.append(svg_text(at, box.bottom + 18, name))
    for value, name in y.ticks:
        at = y.place(value)
        parts.append(f'<path class="grid" d="M{box.left:.1f} {at:.1f}H{box.right:.1f}"/>')
        parts.append(svg_text(box.left - 8, at + 4, name, "end"))
    frame = f'x="{box.left:.1f}" y="{box.top:.1f}" width="{box.width:.1f}"'
    parts.append(f'<rect class="frame" {frame} height="{box.height:.1f}"/>')
    return "\n".join(parts)


def _curve(line: Line, index: int, plot: LinePlot, scales: tuple[Scale, Scale]) -> str:
    x, y = scales
    runs: list[list[tuple[float, float]]] = [[]]
    for point in line.points:
        if _drawable(point, plot):
            runs[-1].append((x.place(point[0]), y.place(point[1])))
        elif runs[-1]:
            runs.append([])
    stroke = _stroke(line, index)
    parts = []
    for run in runs:
        if len(run) > 1:
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py in run)
            parts.append(f'<path class="line" {stroke} d="M{path}"/>')
        if len(run) <= 40:  # more dots than that would hide the line
            parts += [_marker(px, py, index) for px, py in run]
    return "\n".join(parts)


def _marker(x: float, y: float, index: int) -> str:
    """A dot, or beyond seven curves, whose colours come again, a square and then a triangle."""
    fill = f'fill="{COLORS[index % len(COLORS)]}"'
    shape = index // len(COLORS) % 3
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" {fill}/>'
    if shape == 1:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" {fill}/>'
    return f'<path d="M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z" {fill}/>'


def _stroke(line: Line, index: int) -> str:
    dash = _DASHES[1 if line.dashed else index // len(COLORS) % len(_DASHES)]
    color = COLORS[index % len(COLORS)]
    return f'stroke="{color}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _legend_entry(name: str, index: int, plot: LinePlot, box: _Box) -> str:
    x, y = box.right + 14, box.top + 12 + index * 20
    stroke = _stroke(plot.lines[index], index)
    return "\n".join(
        (
            f'<path class="line" {stroke} d="M{x:.1f} {y:.1f}h22"/>',
            _marker(x + 11, y, index),
            svg_text(x + 28, y + 4, name, "start"),
        )
    )


def _cell(x: float, y: float, size: tuple[float, float], value: float | None, plot: HeatMap) -> str:
    width, height = size
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}" rx="3"'
    if value is None or not math.isfinite(value):
        return f'<rect class="empty" {shape}/>'
    span = plot.high - plot.low
    share = min(max((value - plot.low) / span, 0.0), 1.0) if span else 1.0
    red, green, blue = ramp_color(share)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128
    middle = x + (width - 2) / 2, y + height / 2 + 3
    text = svg_text(*middle, plot.show(value), "middle", "on-dark" if dark else "on-light")
    return f'<rect {shape} fill="#{red:02x}{green:02x}{blue:02x}"/>\n{text}'


def ramp_color(share: float) -> tuple[int, int, int]:
    """Red, green, blue, 0..255, of a share 0..1 of the colour scale."""
    at = share * (len(_RAMP) - 1)
    index = min(int(at), len(_RAMP) - 2)
    low, high = _RAMP[index], _RAMP[index + 1]
    red, green, blue = (round(a + (b - a) * (at - index)) for a, b in zip(low, high, strict=True))
    return red, green, blue


Anchor = Literal["start", "middle", "end"]


def svg_text(x: float, y: float, text: str, anchor: Anchor = "middle", kind: str = "") -> str:
    """kind: a class of the page's style."""
    cls = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{cls}>{escape(text)}</text>'


def _labels(below: str, beside: str, box: _Box) -> str:
    middle = box.top + box.height / 2
    return "\n".join(
        (
            svg_text(box.left + box.width / 2, box.bottom + 38, below),
            f'<text x="18" y="{middle:.1f}" text-anchor="middle" '
            f'transform="rotate(-90 18 {middle:.1f})">{escape(beside)}</text>',
        )
    )


def svg_page(width: int, height: int, title: str, note: str, parts: Sequence[str]) -> str:
    """A whole document with its style, title and note around `parts`."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">'
    )
    frame = [
        head,
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        '<rect class="page" width="100%" height="100%" rx="6"/>',
        svg_text(16, 26, title, "start", "title"),
        *parts,
    ]
    if note:
        frame.append(svg_text(16, height - 8, note, "start"))
    return "\n".join([*frame, "</svg>", ""])
