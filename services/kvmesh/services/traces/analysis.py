"""What one trace says: its critical path, its TTFT piece by piece, its decode steps. Pure.

A figure takes spans of one clock only: those of the trace's root. Simulated and measured times of
one trace are never added up.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvmesh.services.common import names
from kvmesh.services.traces.spans import Span
from kvmesh.services.traces.summary import ROUTER_SERVICE

# Pieces of a TTFT by the spans that they are made of. Where spans overlap, the first of this
# order has the time: a fetch lies inside the queue, and says more than it.
TTFT_PIECES = (
    ("KV fetch", (names.SPAN_KV_FETCH, names.SPAN_TAIL_FETCH)),
    ("prefill", (names.SPAN_PREFILL,)),
    ("queue", (names.SPAN_QUEUE,)),
    ("tokenize", (names.SPAN_TOKENIZE,)),
    ("route", (names.SPAN_ROUTE, names.SPAN_MIGRATE)),
    ("hand-over", (names.SPAN_HANDOVER,)),
)
TTFT_ORDER = ("queue", "tokenize", "route", "KV fetch", "prefill", "hand-over", "first step")
FIRST_STEP = "first step"  # after the prefill: the token is chosen and reaches the router
OTHER = "other"  # between the legs: messages on their way, threads that wait
# Spans that last while others work: the path goes through what they wait for.
OVERLAYS = (names.SPAN_DETOKENIZE, names.SPAN_HANDOVER)
STALL_FACTOR = 3.0  # a wait so many times the median of its decode is a stall


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a bar. Milliseconds."""

    name: str
    ms: float


@dataclass(frozen=True, slots=True)
class Window:
    """Some decode steps in a row. Milliseconds from the start of the trace.

    token_ms: mean time for a token. longest_ms: longest wait for one. stall: it stands out.
    """

    start_ms: float
    end_ms: float
    tokens: int
    token_ms: float
    longest_ms: float
    stall: bool


def root_of(spans: Sequence[Span]) -> Span:
    """The first span without a parent, or the first of all. Raises ValueError for no spans."""
    return min(spans, key=lambda span: (span.parent_id is not None, span.start_ns))


def request_of(spans: Sequence[Span]) -> Span:
    """The request's span on the router, which has its facts; the root if there is none.

    An edge or a client may have begun the trace, and may ask for several choices: the first one's.
    """
    requests = request_spans(spans)
    return requests[0] if requests else root_of(spans)


def request_spans(spans: Sequence[Span]) -> list[Span]:
    """The spans of requests on the router, one for each choice, by their start."""
    found = [s for s in spans if s.service == ROUTER_SERVICE and names.OPERATION in s.attributes]
    return sorted(found, key=lambda span: span.start_ns)


def same_clock(spans: Sequence[Span]) -> list[Span]:
    """Those whose times may be set beside the root's."""
    simulated = root_of(spans).simulated
    return [span for span in spans if span.simulated == simulated]


def critical_path(spans: Sequence[Span]) -> set[str]:
    """Ids of the spans without which the trace would have ended sooner.

    From the end of the root backwards: at each moment the child that ended last before it.
    """
    own = same_clock(spans)
    root = root_of(own)
    children: dict[str | None, list[Span]] = defaultdict(list)
    for span in own:
        if span.span_id != span.parent_id:
            children[span.parent_id].append(span)
    path: set[str] = set()
    waiting = [(root, root.end_ns)]
    while waiting:
        span, end = waiting.pop()
        if span.span_id in path:
            continue
        path.add(span.span_id)
        for child in sorted(children[span.span_id], key=lambda s: s.end_ns, reverse=True):
            if child.name not in OVERLAYS and span.start_ns <= child.start_ns < end:
                waiting.append((child, min(end, child.end_ns)))
                end = child.start_ns
    return path


def ttft_pieces(spans: Sequence[Span]) -> list[Piece]:
    """The time to the first token, split; the pieces add up to it. Empty if the root has none."""
    own = same_clock(spans)
    root = request_of(own)
    seconds = root.attributes.get(names.TIME_TO_FIRST)
    if not isinstance(seconds, int | float) or seconds <= 0:
        return []
    start, end = root.start_ns, root.start_ns + int(seconds * 1e9)
    found = _sweep(_intervals(_below(own, root), start, end), start, end)
    order = (*TTFT_ORDER, OTHER)
    return [Piece(name, found[name] / 1e6) for name in order if found.get(name)]


def _below(spans: Sequence[Span], top: Span) -> list[Span]:
    """`top` and all that it led to; other choices of the same trace are not."""
    children: dict[str | None, list[Span]] = defaultdict(list)
    for span in spans:
        children[span.parent_id].append(span)
    found, waiting, seen = list[Span](), [top], set[str]()
    while waiting:
        span = waiting.pop()
        if span.span_id not in seen:
            seen.add(span.span_id)
            found.append(span)
            waiting += children[span.span_id]
    return found


def _intervals(spans: Sequence[Span], start: int, end: int) -> list[tuple[int, int, int]]:
    """(from, to, rank in TTFT_PIECES) inside [start, end), nanoseconds."""
    ranks = {name: rank for rank, (_, ns) in enumerate(TTFT_PIECES) for name in ns}
    cut = [
        (max(start, span.start_ns), min(end, span.end_ns), ranks[span.name])
        for span in spans
        if span.name in ranks
    ]
    return [item for item in cut if item[0] < item[1]]


def _sweep(intervals: list[tuple[int, int, int]], start: int, end: int) -> dict[str, int]:
    edges = sorted({start, end, *(a for a, _, _ in intervals), *(b for _, b, _ in intervals)})
    prefilled = max((b for _, b, rank in intervals if rank == 1), default=end)
    total: dict[str, int] = defaultdict(int)
    for left, right in pairwise(edges):
        rank = min((r for a, b, r in intervals if a <= left and right <= b), default=None)
        rest = FIRST_STEP if left >= prefilled else OTHER
        total[TTFT_PIECES[rank][0] if rank is not None else rest] += right - left
    return total


def decode_windows(spans: Sequence[Span]) -> list[Window]:
    """The decode steps of every leg, from the marks of the `decode` spans."""
    origin = min((span.start_ns for span in spans), default=0)
    windows: list[Window] = []
    for span in sorted(same_clock(spans), key=lambda s: s.start_ns) if spans else []:
        if span.name == names.SPAN_DECODE:
            windows += _windows(span, origin)
    return windows


def _windows(span: Span, origin: int) -> list[Window]:
    marks = [
        (e["time_ns"], int(a[names.TOKENS]), float(a.get(names.LONGEST_STEP, 0.0)) * 1e3)
        for e in span.events
        if names.TOKENS in (a := e["attributes"])
    ]
    # Before the first mark: the span begins with the first token.
    previous, rows = (span.start_ns, 1), []
    for at, count, longest in marks:
        if count > previous[1] and at > previous[0]:
            mean = (at - previous[0]) / 1e6 / (count - previous[1])
            rows.append((previous[0], at, count - previous[1], mean, max(mean, longest)))
        previous = (at, max(count, previous[1]))
    if not rows:
        return []
    usual = sorted(row[3] for row in rows)[len(rows) // 2]
    return [
        Window((a - origin) / 1e6, (b - origin) / 1e6, n, mean, longest,
               longest > STALL_FACTOR * usual)
        for a, b, n, mean, longest in rows
    ]  # fmt: skip


def candidates(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Each decision of the router: {"span_id", "reason", "predicted_s", "candidates"}."""
    found = []
    for span in sorted(spans, key=lambda s: s.start_ns):
        text = span.attributes.get(names.CANDIDATES)
        if not isinstance(text, str):
            continue
        try:
            table = json.loads(text)
        except ValueError:
            continue
        found.append(
            {
                "span_id": span.span_id,
                "reason": span.attributes.get(names.REASON, ""),
                "predicted_s": span.attributes.get(names.PREDICTED),
                "candidates": table,
            }
        )
    return found


def kv_bytes(spans: Sequence[Span]) -> dict[str, int]:
    """Bytes of KV on the wire and the same as fp16, fetched and stored; tails are never coded."""
    own = same_clock(spans)

    def total(name: str, key: str) -> int:
        return sum(int(s.attributes.get(key, 0)) for s in own if s.name == name)

    return {
        "fetched_wire": total(names.SPAN_KV_FETCH, names.BYTES),
        "fetched_raw": total(names.SPAN_KV_FETCH, names.RAW_BYTES),
        "stored_wire": total(names.SPAN_KV_PUT, names.BYTES),
        "stored_raw": total(names.SPAN_KV_PUT, names.RAW_BYTES),
        "tail_wire": total(names.SPAN_TAIL_FETCH, names.BYTES),
    }
