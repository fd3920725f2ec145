"""Traces: W3C context through every hop, finished spans to OTLP or to a bounded local store.

The standard OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) turns on OTLP over
gRPC. Without it spans are appended to `<run dir>/spans/<member>.jsonl`, which `kvmesh trace` reads.
OTEL_SDK_DISABLED=true turns tracing off.
"""

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvmesh.services.common import names

OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
MAX_FILE_BYTES = 8 << 20  # per member; two files are kept, so at most twice this

_PROPAGATOR = TraceContextTextMapPropagator()


def inject(context: Context | None = None) -> tuple[tuple[str, str], ...]:
    """`traceparent` (and `tracestate`) of the current span as call metadata; empty without one."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    return tuple(carrier.items())


def extract(metadata: Iterable[tuple[str, Any]] | None) -> Context:
    """The caller's trace context from call metadata; an empty context if it sent none."""
    carrier = {k: str(v) for k, v in metadata or () if k in ("traceparent", "tracestate")}
    return _PROPAGATOR.extract(carrier, Context())


def context_of(span: trace.Span) -> Context:
    """A context whose current span is `span`, for starting children or injecting."""
    return trace.set_span_in_context(span, Context())


def trace_id_of(span: trace.Span) -> str:
    """32 hex digits."""
    return format(span.get_span_context().trace_id, "032x")


class LocalSpanStore(SpanExporter):
    """Appends finished spans to a JSON-lines file that is rotated once, so its size is bounded.

    A span that cannot be written is dropped and counted; a request never fails for its trace.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_FILE_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self.dropped = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        text = "".join(
            json.dumps(span_record(span), separators=(",", ":")) + "\n" for span in spans
        )
        with self._lock:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                if self._path.exists() and self._path.stat().st_size + len(text) > self._max_bytes:
                    self._path.replace(self._path.with_suffix(".old.jsonl"))
                with self._path.open("a") as file:
                    file.write(text)
            except OSError:
                self.dropped += len(spans)
                return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def span_record(span: ReadableSpan) -> dict[str, Any]:
    """One span as the local store keeps it; times are Unix nanoseconds."""
    own = span.get_span_context()
    attributes: Mapping[str, Any] = {**span.resource.attributes, **(span.attributes or {})}
    return {
        "trace_id": format(own.trace_id, "032x") if own else "",
        "span_id": format(own.span_id, "016x") if own else "",
        "parent_id": format(span.parent.span_id, "016x") if span.parent else None,
        "name": span.name,
        "service": attributes.get("service.name", ""),
        "member": attributes.get("service.instance.id", ""),
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "status": span.status.status_code.name,
        "status_message": span.status.description or "",
        "attributes": _plain(span.attributes or {}),
        "events": [
            {"name": e.name, "time_ns": e.timestamp, "attributes": _plain(e.attributes or {})}
            for e in span.events
        ],
    }


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in attributes.items()}


class Telemetry:
    """One process's tracer. Close it to flush what is still in memory."""

    def __init__(self, service: str, member: str, spans_dir: Path | None) -> None:
        resource = Resource.create(
            {
                "service.name": f"kvmesh-{service}",
                "service.instance.id": member,
                names.CLOCK: "measured",
            }
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = _exporter(member, spans_dir)
        if exporter is not None:
            self._provider.add_span_processor(
                BatchSpanProcessor(exporter, schedule_delay_millis=500, max_queue_size=8192)
            )
        self.tracer: trace.Tracer = self._provider.get_tracer("kvmesh")
        self._labels = {names.SERVICE: service, names.MEMBER: member}

    def start(
        self,
        name: str,
        parent: Context | None = None,
        attributes: Mapping[str, Any] | None = None,
        start_ns: int | None = None,
        kind: trace.SpanKind = trace.SpanKind.INTERNAL,
    ) -> trace.Span:
        """A span that the caller must end. Without `parent`: a child of the current span.

        Service and member are span attributes too, since some back ends drop resource attributes.
        """
        return self.tracer.start_span(
            name,
            context=parent if parent is not None else otel_context.get_current(),
            attributes={**self._labels, **(attributes or {})},
            start_time=start_ns,
            kind=kind,
        )

    def close(self) -> None:
        """Flushes and stops. Twice is safe."""
        self._provider.shutdown()


def _exporter(member: str, spans_dir: Path | None) -> SpanExporter | None:
    if any(os.environ.get(name) for name in OTLP_VARIABLES):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    return LocalSpanStore(spans_dir / f"{member}.jsonl") if spans_dir is not None else None
