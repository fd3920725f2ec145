"""PNG of a plot: as large as it should be, in the SVG's colours, with its text."""

import struct
import zlib

import pytest

from kvmesh.integration import plot_png
from kvmesh.integration.plots import HeatMap, heat_map, ramp_color


def pixels(data: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and rows of RGBA, for the filters that a PNG's rows may have."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert (depth, kind) == (8, 6)
    packed, at = b"", 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + size]
        at += size + 12
    raw, stride = zlib.decompress(packed), 4 * width
    rows, above = [], bytes(stride)
    for y in range(height):
        kind, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 :][:stride])
        for i in range(stride):
            left, corner = (line[i - 4], above[i - 4]) if i >= 4 else (0, 0)
            line[i] = (line[i] + _predicted(kind, left, above[i], corner)) & 255
        above = bytes(line)
        rows.append(above)
    return width, height, rows


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    if kind == 4:
        paeth = left + up - corner
        return min((left, up, corner), key=lambda value: abs(paeth - value))
    return (0, left, up, (left + up) // 2)[kind]


def test_a_heat_map_keeps_its_colours() -> None:
    plot = HeatMap("Needle", ["256"], ["0%", "50%"], [[1.0], [0.0]], note="made by x")
    svg = heat_map(plot)
    width, height, rows = pixels(plot_png.png(svg))
    assert f'width="{width // 2}" height="{height // 2}"' in svg
    found = {row[i : i + 3] for row in rows for i in range(0, len(row), 4)}
    assert {bytes(ramp_color(1.0)), bytes(ramp_color(0.0)), b"\xff\xff\xff"} <= found


def test_text_is_drawn_where_there_is_a_font() -> None:
    plot = HeatMap("Needle", ["256"], ["0%"], [[1.0]])
    named = plot_png.png(heat_map(plot))
    other = plot_png.png(heat_map(HeatMap("Noodle", ["256"], ["0%"], [[1.0]])))
    assert plot_png.draws_text() == (named != other)


def test_what_is_no_svg_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown token at 1:1"):
        plot_png.png("no svg")
