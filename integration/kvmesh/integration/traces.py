"""Traces from the local span files: found, ordered into a tree, laid out as a waterfall.

Pure but for `load_spans`, which reads the files.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAST = "last"
ROUTER_SERVICE = "kvmesh-router"  # where the trace of a request begins


@dataclass(frozen=True, slots=True)
class Span:
    """One finished span; times are Unix nanoseconds, status is UNSET, OK or ERROR."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    service: str
    member: str
    start_ns: int
    end_ns: int
    status: str
    status_message: str
    attributes: dict[str, Any]
    events: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One trace in a list. name: of its root span; start_ns: Unix nanoseconds.

    is_request: a client's request, not a probe or a look-up of the mesh's own.
    """

    trace_id: str
    name: str
    start_ns: int
    duration_ms: float
    num_spans: int
    members: tuple[str, ...]
    errors: int
    is_request: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a waterfall. offset_ms: from the start of the trace.

    depth: below the root. detached: its parent is not in the files, because it has not ended, was
        dropped, or belongs to another system.
    """

    span: Span
    depth: int
    offset_ms: float
    duration_ms: float
    detached: bool


def load_spans(spans_dir: Path) -> list[Span]:
    """All spans in the directory, older files included. A line cut short is skipped."""
    spans: list[Span] = []
    for path in sorted(spans_dir.glob("*.jsonl")):
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:  # rotated away in between
            continue
        spans.extend(parse_spans(text.splitlines()))
    return spans


def parse_spans(lines: Iterable[str]) -> list[Span]:
    spans: list[Span] = []
    for line in lines:
        try:
            spans.append(Span(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return spans


def summarize(spans: Iterable[Span]) -> list[TraceSummary]:
    """All traces, the newest first."""
    traces: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        traces[span.trace_id].append(span)
    found = [_summary(trace_id, trace) for trace_id, trace in traces.items()]
    return sorted(found, key=lambda summary: summary.start_ns, reverse=True)


def _summary(trace_id: str, spans: Sequence[Span]) -> TraceSummary:
    start = min(span.start_ns for span in spans)
    end = max(span.end_ns for span in spans)
    root = min(spans, key=lambda span: (span.parent_id is not None, span.start_ns))
    return TraceSummary(
        trace_id=trace_id,
        name=root.name,
        start_ns=start,
        duration_ms=(end - start) / 1e6,
        num_spans=len(spans),
        members=tuple(sorted({span.member for span in spans})),
        errors=sum(span.status == "ERROR" for span in spans),
        is_request=root.service == ROUTER_SERVICE,
    )


def find_trace(spans: Sequence[Span], wanted: str) -> list[Span]:
    """The spans of one trace: the `last` request's, or by a trace id or the start of one.

    Raises LookupError, which names the candidates, if none or several fit.
    """
    if wanted == LAST:
        requests = [summary.trace_id for summary in summarize(spans) if summary.is_request]
        ids = set(requests[:1])
    else:
        ids = {span.trace_id for span in spans if span.trace_id.startswith(wanted.lower())}
    if not ids:
        raise LookupError("no request is stored yet" if wanted == LAST else f"no trace {wanted}")
    if len(ids) > 1:
        raise LookupError(f"{wanted} fits {len(ids)} traces: {', '.join(sorted(ids)[:5])}")
    return [span for span in spans if span.trace_id in ids]


def waterfall(spans: Sequence[Span]) -> list[Row]:
    """The spans of one trace in the order of a tree: parents first, siblings by their start."""
    if not spans:
        return []
    known = {span.span_id for span in spans}
    children: dict[str | None, list[Span]] = defaultdict(list)
    ordered = sorted(spans, key=lambda s: (s.start_ns, s.end_ns, s.span_id))
    for span in ordered:
        children[span.parent_id if span.parent_id in known else None].append(span)
    origin = ordered[0].start_ns
    rows: list[Row] = []
    seen: set[str] = set()
    # A stack, since a chain of spans may be deeper than Python's own recursion. Below the roots lie
    # spans that are in no tree: ids from another system may form a ring.
    stack = [(span, 0) for span in [*children[None], *ordered][::-1]]
    while stack:
        span, depth = stack.pop()
        if span.span_id not in seen:
            seen.add(span.span_id)
            rows.append(_row(span, depth, origin))
            stack.extend((child, depth + 1) for child in reversed(children[span.span_id]))
    return rows


def _row(span: Span, depth: int, origin_ns: int) -> Row:
    return Row(
        span=span,
        depth=depth,
        offset_ms=(span.start_ns - origin_ns) / 1e6,
        duration_ms=(span.end_ns - span.start_ns) / 1e6,
        detached=depth == 0 and span.parent_id is not None,
    )


def bar(row: Row, total_ms: float, width: int) -> tuple[int, int]:
    """Where a row's bar begins and how long it is, in characters of a line of `width`.

    Every span shows, however short: at least one character, inside the line.
    """
    if total_ms <= 0:
        return 0, width
    begin = min(width - 1, max(0, int(row.offset_ms / total_ms * width)))
    length = max(1, round(row.duration_ms / total_ms * width))
    return begin, min(length, width - begin)


def total_ms(rows: Iterable[Row]) -> float:
    """From the trace's start to its last end."""
    return max((row.offset_ms + row.duration_ms for row in rows), default=0.0)
