"""The plot of a waterfall: how output tokens/s per device come to be, step by step."""

from kvmesh.integration.planning.switches import TITLES
from kvmesh.integration.planning.waterfall import Waterfall
from kvmesh.integration.plot_bars import Bar, BarPlot, bar_plot
from kvmesh.integration.plot_scale import Axis


def waterfall_plot(found: Waterfall, title: str) -> str:
    """SVG. Steps are drawn one after another at their mean factors, whiskers are the spread over
    orders."""
    at = found.base.tokens_s_device
    bars = [Bar(f"{found.base.device}, none on", at, at, f"{at:,.0f}", total=True)]
    for step in found.steps:
        whisker = (at * step.low, at * step.high)
        bars.append(Bar(TITLES[step.name], at, at * step.factor, f"x {step.factor:.2f}", whisker))
        at *= step.factor
    full, final = found.full.tokens_s_device, found.final.tokens_s_device
    bars.append(Bar("all optimisations", full, full, f"{full:,.0f}", total=True))
    if found.hardware is not None:
        hardware = found.hardware
        whisker = (full * hardware.low, full * hardware.high)
        bars.append(Bar(hardware.name, full, final, f"x {hardware.factor:.2f}", whisker))
        bars.append(Bar(f"{found.final.device}, all on", final, final, f"{final:,.0f}", total=True))
    least = min(min(bar.start, *(bar.whisker or (bar.end,))) for bar in bars)
    axis = Axis("output tokens/s per device, logarithmic", "log", low=least / 1.5)
    note = "simulated; mean factor over orders, whiskers: least and most of any order"
    return bar_plot(BarPlot(title, axis, bars, note))
