"""Speed against context, ours and the fastest of the others. Pure."""

from kvmesh.integration.bench_kernels import KernelReport
from kvmesh.integration.plot_scale import Axis
from kvmesh.integration.plots import Line, LinePlot, line_plot


def kernels_plot(report: KernelReport) -> str:
    """SVG: seconds of decode attention against context; of each width only what was fastest
    somewhere. Raises ValueError if no decode was measured."""
    lines: dict[str, dict[int, float]] = {}
    fastest = {row.baseline for row in report.rows if row.op == "decode" and row.fastest}
    for row in report.rows:
        if row.op == "decode":
            lines.setdefault(f"kvmesh {row.codec}", {})[row.context] = row.seconds
    for row in report.rows:
        if row.op == "decode" and row.baseline in fastest:
            lines.setdefault(row.baseline, {}).setdefault(row.context, row.baseline_seconds)
    if not lines:
        raise ValueError("no decode was measured, nothing to draw; give --ops decode")
    drawn = [
        Line(name, [(x, y * 1e3) for x, y in sorted(points.items())], not name.startswith("kvmesh"))
        for name, points in lines.items()
    ]
    shape = next(row for row in report.rows if row.op == "decode")
    title = (
        f"Decode attention of one token, {shape.kv_heads} KV heads of {shape.head_dim}, "
        f"group {shape.group}, {shape.threads} threads"
    )
    x, y = Axis("tokens of context", "log2"), Axis("milliseconds", "log")
    return line_plot(LinePlot(title, x, y, drawn, "kvmesh bench kernels --plot", width=860))
