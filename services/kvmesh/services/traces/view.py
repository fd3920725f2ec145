"""One trace as the page shows it. Pure."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvmesh.services.common import names
from kvmesh.services.traces.analysis import (
    candidates,
    critical_path,
    decode_windows,
    kv_bytes,
    request_of,
    request_spans,
    root_of,
    ttft_pieces,
)
from kvmesh.services.traces.spans import Span
from kvmesh.services.traces.summary import TraceSummary
from kvmesh.services.traces.tree import total_ms, waterfall


def trace_view(
    spans: Sequence[Span], summary: TraceSummary | None, linked: Sequence[TraceSummary]
) -> dict[str, Any]:
    """Plain data for JSON. spans: of one trace, at least one."""
    rows = waterfall(spans)
    path = critical_path(spans)
    return {
        "summary": asdict(summary) if summary is not None else None,
        "total_ms": total_ms(rows),
        "rows": [
            {
                **row.span.record(),
                "depth": row.depth,
                "offset_ms": row.offset_ms,
                "duration_ms": row.duration_ms,
                "detached": row.detached,
                "critical": row.span.span_id in path,
                "simulated": row.span.simulated,
                "events": _events(row.span, row.offset_ms),
            }
            for row in rows
        ],
        "ttft": [asdict(piece) for piece in ttft_pieces(spans)],
        "after_first_ms": _after_first(spans),
        "decode": [asdict(window) for window in decode_windows(spans)],
        "routes": candidates(spans),
        "kv": kv_bytes(spans),
        "cost": _cost(spans),
        "linked": [asdict(other) for other in linked],
    }


def _events(span: Span, offset_ms: float) -> list[dict[str, Any]]:
    return [
        {**event, "at_ms": offset_ms + (event["time_ns"] - span.start_ns) / 1e6}
        for event in span.events
    ]


def _after_first(spans: Sequence[Span]) -> float | None:
    """Of a hand-over that came after the first token: its milliseconds."""
    root = root_of(spans)
    found = [
        span.duration_ms
        for span in spans
        if span.name == names.SPAN_HANDOVER and span.simulated == root.simulated
    ]
    return sum(found) if found else None


def _cost(spans: Sequence[Span]) -> dict[str, float | str]:
    """What the request says that it cost, all its choices together; empty if it says nothing."""
    first = request_of(spans)
    keys = (names.COST_USD, names.COST_DEVICE, *names.COST_SPLIT, names.COST_PRICE, names.COST_KIND)
    known = first.attributes
    cost = {key: known[key] for key in keys if isinstance(known.get(key), int | float | str)}
    others = [
        span
        for span in request_spans(spans)
        if span.span_id != first.span_id
        and span.attributes.get(names.COST_KIND) == known.get(names.COST_KIND)
    ]
    for key in (names.COST_USD, names.COST_DEVICE, *names.COST_SPLIT):
        if key in cost:
            cost[key] += sum(span.attributes.get(key, 0.0) for span in others)
    return cost
