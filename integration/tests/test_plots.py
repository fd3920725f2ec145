"""Plots as SVG: well formed, every number where its axis says, nothing else drawn."""

import math
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from kvmesh.integration.plot_scale import Axis, fit_scale, format_number
from kvmesh.integration.plots import HeatMap, Line, LinePlot, heat_map, line_plot, ramp_color

SVG = "{http://www.w3.org/2000/svg}"


def parse(text: str) -> ET.Element:
    return ET.fromstring(text)


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def plot(**changes: Any) -> LinePlot:
    line = Line("k4v4", [(1, 10), (10, 100), (100, 1000)])
    fields: dict[str, Any] = {
        "title": "Speed <now> & then",
        "x": Axis("tokens", "log"),
        "y": Axis("ms", "log"),
        "lines": [line],
        **changes,
    }
    return LinePlot(**fields)


def test_points_lie_where_the_axes_say() -> None:
    dots = [
        (float(dot.attrib["cx"]), float(dot.attrib["cy"]))
        for dot in parse(line_plot(plot())).iter(f"{SVG}circle")
    ]
    assert len(dots) == 3
    # Equal ratios are equal distances on logarithmic axes; y grows upwards.
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    assert dots[0][1] - dots[1][1] == pytest.approx(dots[1][1] - dots[2][1], abs=0.2)
    assert dots[0][1] > dots[1][1] > dots[2][1]


def test_text_is_escaped_and_the_legend_needs_two_lines() -> None:
    alone = line_plot(plot())
    assert "Speed &lt;now&gt; &amp; then" in alone
    assert "k4v4" not in texts(parse(alone))
    both = plot(lines=[Line("k4v4", [(1, 1)]), Line("fp16 & fp32", [(2, 2)])], note="made by x")
    assert {"k4v4", "fp16 & fp32", "made by x"} <= set(texts(parse(line_plot(both))))


def test_a_gap_breaks_the_line() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, math.nan), (4.0, 4.0), (5.0, 5.0), (6.0, -1.0)]
    root = parse(line_plot(plot(lines=[Line("a", points)])))
    paths = [path for path in root.iter(f"{SVG}path") if path.attrib["class"] == "line"]
    assert len(paths) == 2  # the last point cannot be shown on a logarithmic axis
    assert len(list(root.iter(f"{SVG}circle"))) == 4


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="no point to draw"):
        line_plot(plot(lines=[Line("a", [(0.0, 1.0)])]))
    with pytest.raises(ValueError, match="must be > 0"):
        line_plot(plot(y=Axis("ms", "log", low=0.0)))
    with pytest.raises(ValueError, match="out of order"):
        fit_scale(Axis("ms", low=2.0, high=1.0), [1.0], 0, 1)


@pytest.mark.parametrize(
    ("axis", "values", "ticks"),
    [
        (Axis("", "linear"), [0, 9.3], ["0", "2", "4", "6", "8", "10"]),
        (Axis("", "linear", 0, 1), [0.2, 0.3], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis("", "log2"), [4096, 32768], ["4,096", "8k", "16k", "32k"]),
        (Axis("", "log"), [1e-6, 0.1], ["1e-6", "1e-5", "1e-4", "0.001", "0.01", "0.1"]),
        (Axis("", "log"), [120, 800], ["200", "500"]),
        (Axis("", "linear"), [3, 3], ["1", "2", "3", "4", "5"]),
    ],
)
def test_ticks(axis: Axis, values: list[float], ticks: list[str]) -> None:
    scale = fit_scale(axis, values, 100, 200)
    assert [name for _, name in scale.ticks] == ticks
    assert all(100 <= scale.place(value) <= 200 for value in values)
    assert scale.place(scale.low) == 100 and scale.place(scale.high) == 200


def test_heat_map_shows_every_value_in_its_colour() -> None:
    made = heat_map(
        HeatMap("needle", ["256", "512"], ["0 %", "100 %"], [[1.0, 0.5], [None, 0.0]], "tokens")
    )
    root = parse(made)
    cells = [rect for rect in root.iter(f"{SVG}rect") if rect.attrib.get("rx") == "3"]
    colours = [cell.attrib.get("fill") for cell in cells]
    low, high = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (ramp_color(0.0), ramp_color(1.0)))
    assert colours[0] == high and colours[2] is None and colours[3] == low
    assert {"1", "0.5", "0", "tokens", "100 %"} <= set(texts(root))


def test_heat_map_refuses_a_ragged_table() -> None:
    with pytest.raises(ValueError, match="2 rows of 1 values"):
        heat_map(HeatMap("needle", ["256"], ["0", "1"], [[1.0], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="no cells"):
        heat_map(HeatMap("needle", [], [], []))


def test_the_ramp_rises_in_lightness() -> None:
    light = [sum(ramp_color(step / 20)) for step in range(21)]
    assert light == sorted(light)


@pytest.mark.parametrize(
    ("value", "name"),
    [(0, "0"), (0.25, "0.25"), (1024, "1,024"), (65536, "64k"), (2e-7, "2e-7"), (9000, "9,000")],
)
def test_numbers_are_short(value: float, name: str) -> None:
    assert format_number(value) == name
