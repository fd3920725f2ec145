"""Where the spans of a test go: through OTLP's own encoding, as the receiver would get them."""

from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvmesh.services.common.span_sender import SpanSender
from kvmesh.services.traces.spans import spans_of


class _Kept(InMemorySpanExporter):
    """Goes on when one of several senders has closed it."""

    def shutdown(self) -> None:
        pass


class SpanSink:
    def __init__(self) -> None:
        self._kept = _Kept()

    @property
    def senders(self) -> list[SpanSender]:
        """A new one for each process."""
        return [SpanSender(self._kept)]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All that has arrived, in no order."""
        return list(spans_of(encode_spans(self._kept.get_finished_spans()).resource_spans))
