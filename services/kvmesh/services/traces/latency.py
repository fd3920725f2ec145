"""Latency over time: a point for each request, percentiles for each stretch of time. Pure."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kvmesh.services.common.percentile import percentile
from kvmesh.services.traces.summary import TraceSummary

MAX_BINS = 60
PERCENTILES = (50, 95, 99)
METRICS = ("ttft", "tpot", "duration")


def value_ms(trace: TraceSummary, metric: str) -> float | None:
    """Milliseconds; None if the trace does not say."""
    if metric == "duration":
        return trace.duration_ms
    seconds = trace.ttft_s if metric == "ttft" else trace.tpot_s
    return seconds * 1e3 if seconds is not None else None


def latency(traces: Sequence[TraceSummary], metric: str, clock: str) -> dict[str, Any]:
    """Points and percentiles of one clock alone: what is simulated is never summed with measured.

    points: [Unix seconds, ms, trace id], oldest first. bins: [Unix seconds, p50, p95, p99].
    """
    found = sorted(
        (trace.start_ns / 1e9, value, trace.trace_id)
        for trace in traces
        if trace.clock == clock and (value := value_ms(trace, metric)) is not None
    )
    bins: dict[int, list[float]] = defaultdict(list)
    first = found[0][0] if found else 0.0
    width = max(1.0, (found[-1][0] - first) / MAX_BINS) if found else 1.0
    for at, value, _ in found:
        bins[int((at - first) / width)].append(value)
    rows = [
        [first + (number + 0.5) * width, *(percentile(sorted(v), p / 100) for p in PERCENTILES)]
        for number, v in sorted(bins.items())
    ]
    every = sorted(value for _, value, _ in found)
    total = {f"p{p}": percentile(every, p / 100) for p in PERCENTILES} if every else {}
    return {"metric": metric, "clock": clock, "points": found, "bins": rows, "all": total}
