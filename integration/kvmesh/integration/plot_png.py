"""Plots as PNG, drawn from their SVG by resvg, for programs that show no SVG."""

import functools

import resvg_py

ZOOM = 2.0  # pixels for one of the SVG's, sharp on dense screens
_PROBE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">{}</svg>',
    '<text x="2" y="16" font-size="16" font-family="sans-serif">M</text>',
)


def png(svg: str) -> bytes:
    """Raises ValueError for a text that is no SVG."""
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=ZOOM))


@functools.cache
def draws_text() -> bool:
    """Whether this machine has a font: without one, resvg leaves texts out and says nothing."""
    page, text = _PROBE
    return png(page.format(text)) != png(page.format(""))
