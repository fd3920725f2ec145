"""One trace in other tools' words: Chrome trace events, and OTLP as JSON. Pure.

Formats: "Trace Event Format" of Chromium, which Perfetto opens; the JSON encoding of OTLP 1.x
(ids in hex, 64-bit integers as strings).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kvmesh.services.traces.spans import Span

_OTLP_STATUS = {"OK": 1, "ERROR": 2}


def chrome_json(spans: Sequence[Span]) -> dict[str, Any]:
    """{"traceEvents": ...}; a process for each member, a thread for each row of spans in it."""
    events: list[dict[str, Any]] = []
    by_member: dict[tuple[str, bool], list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: (s.start_ns, -s.end_ns)):
        by_member[span.member or span.service, span.simulated].append(span)
    origin = min((span.start_ns for span in spans), default=0)
    for pid, ((member, simulated), group) in enumerate(by_member.items(), 1):
        name = member + (" (simulated)" if simulated else "")
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        for span, row in zip(group, _rows(group), strict=True):
            events += _chrome_events(span, pid, row, origin)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _rows(spans: Sequence[Span]) -> list[int]:
    """A row for each span: inside or after its last, as bars of a thread must not cross."""
    open_spans: list[list[Span]] = []
    rows: list[int] = []
    for span in spans:
        for row, stack in enumerate(open_spans):
            while stack and stack[-1].end_ns <= span.start_ns:
                stack.pop()
            if not stack or stack[-1].end_ns >= span.end_ns:
                stack.append(span)
                rows.append(row)
                break
        else:
            rows.append(len(open_spans))
            open_spans.append([span])
    return rows


def _chrome_events(span: Span, pid: int, tid: int, origin: int) -> list[dict[str, Any]]:
    arguments = {**span.attributes, "span_id": span.span_id, "trace_id": span.trace_id}
    if span.status == "ERROR":
        arguments["error"] = span.status_message
    place = {"pid": pid, "tid": tid, "cat": span.service}
    return [
        {
            "ph": "X", "name": span.name, "ts": (span.start_ns - origin) / 1e3,
            "dur": (span.end_ns - span.start_ns) / 1e3, "args": arguments, **place,
        },
        *(
            {
                "ph": "i", "s": "t", "name": event["name"],
                "ts": (event["time_ns"] - origin) / 1e3, "args": event["attributes"], **place,
            }
            for event in span.events
        ),
    ]  # fmt: skip


def otlp_json(spans: Sequence[Span]) -> dict[str, Any]:
    """An ExportTraceServiceRequest."""
    groups: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: s.start_ns):
        groups[repr(sorted(span.resource.items()))].append(span)
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(group[0].resource)},
                "scopeSpans": [
                    {"scope": {"name": "kvmesh"}, "spans": [_otlp_span(s) for s in group]}
                ],
            }
            for group in groups.values()
        ]
    }


def _otlp_span(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "name": span.name,
        "kind": 1,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
        "events": [
            {
                "name": event["name"],
                "timeUnixNano": str(event["time_ns"]),
                "attributes": _attributes(event["attributes"]),
            }
            for event in span.events
        ],
        "links": [
            {
                "traceId": link["trace_id"],
                "spanId": link["span_id"],
                "attributes": _attributes(link["attributes"]),
            }
            for link in span.links
        ],
        "status": {"code": _OTLP_STATUS.get(span.status, 0), "message": span.status_message},
    }
    if span.parent_id:
        found["parentSpanId"] = span.parent_id
    return found


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(item) for item in value]}}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": _attributes(value)}}
    return {"stringValue": str(value)} if value is not None else {}
