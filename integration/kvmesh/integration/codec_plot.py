"""What a byte buys, of every way to store keys and values on one sample. Pure."""

from collections.abc import Sequence

from kvmesh.integration.bench_codec import CodecRow
from kvmesh.integration.plot_scale import Axis
from kvmesh.integration.plots import Line, LinePlot, line_plot

_NOTE = "both of one token and head, side information counted; kvmesh bench codec --plot"


def codec_plot(rows: Sequence[CodecRow], sample: str) -> str:
    """SVG: softmax KL against bytes per token. Widths of one method are a line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.sample == sample:
            family, _, width = row.method.rpartition(" ")
            is_width = bool(family) and width.replace(".", "").isdigit()
            point = (row.bits_per_element * row.head_dim / 4, row.losses.softmax_kl)
            lines.setdefault(family if is_width else row.method, []).append(point)
    drawn = [
        Line(name, sorted(points), dashed=not name.startswith("kvmesh"))
        for name, points in lines.items()
    ]
    x = Axis("bytes of K and V per token and head", "log2")
    y = Axis("KL of the softmax, nats", "log")
    return line_plot(LinePlot(f"Loss against memory, {sample}", x, y, drawn, _NOTE))
