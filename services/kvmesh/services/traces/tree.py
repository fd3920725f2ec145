"""The spans of one trace, ordered into a tree and laid out as a waterfall. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvmesh.services.traces.spans import Span


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a waterfall. offset_ms: from the start of the trace.

    depth: below the root. detached: its parent is not in the store, because it has not ended, was
        dropped, or belongs to another system.
    """

    span: Span
    depth: int
    offset_ms: float
    duration_ms: float
    detached: bool


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
