"""A stored span, and how it is made from OTLP. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from kvmesh.services.common import names

SIMULATED = "simulated"
_STATUS = ("UNSET", "OK", "ERROR")


@dataclass(frozen=True, slots=True)
class Span:
    """One finished span; times are Unix nanoseconds, status is UNSET, OK or ERROR.

    resource: attributes of the process. links: {"trace_id", "span_id", "attributes"} each.
    """

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
    links: list[dict[str, Any]] = field(default_factory=list)
    resource: dict[str, Any] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        """Whether its times come from a model of a device instead of a clock."""
        clock = self.attributes.get(names.CLOCK, self.resource.get(names.CLOCK))
        return bool(clock == SIMULATED)

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6

    def record(self) -> dict[str, Any]:
        """As it is stored and sent to the page; Span(**record) is the same span."""
        return asdict(self)


def spans_of(resources: Iterable[trace_pb2.ResourceSpans]) -> Iterator[dict[str, Any]]:
    """The record of every span of an OTLP request, in its order."""
    for group in resources:
        resource = attributes_of(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield _record(span, resource)


def attributes_of(pairs: Iterable[common_pb2.KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _record(span: trace_pb2.Span, resource: dict[str, Any]) -> dict[str, Any]:
    return {
        "trace_id": span.trace_id.hex(),
        "span_id": span.span_id.hex(),
        "parent_id": span.parent_span_id.hex() or None,
        "name": span.name,
        "service": str(resource.get("service.name", "")),
        "member": str(resource.get("service.instance.id", "")),
        "start_ns": span.start_time_unix_nano,
        "end_ns": max(span.start_time_unix_nano, span.end_time_unix_nano),
        "status": _STATUS[span.status.code] if 0 <= span.status.code < 3 else "UNSET",
        "status_message": span.status.message,
        "attributes": attributes_of(span.attributes),
        "events": [
            {
                "name": event.name,
                "time_ns": event.time_unix_nano,
                "attributes": attributes_of(event.attributes),
            }
            for event in span.events
        ],
        "links": [
            {
                "trace_id": link.trace_id.hex(),
                "span_id": link.span_id.hex(),
                "attributes": attributes_of(link.attributes),
            }
            for link in span.links
        ],
        "resource": resource,
    }


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return attributes_of(value.kvlist_value.values)
    if kind == "bytes_value":
        return value.bytes_value.hex()
    return getattr(value, kind) if kind else None
