"""Traces: W3C context through every hop, finished spans over OTLP to a receiver.

`kvmesh up` starts a receiver of its own and names it to every process in KVMESH_TRACES; the
standard OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) joins or replaces it.
OTEL_SDK_DISABLED=true turns tracing off.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvmesh.services.common import names
from kvmesh.services.common.span_sender import SpanSender

OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
TRACES_VARIABLE = "KVMESH_TRACES"  # host:port of the mesh's own receiver
EXPORT_S = 2.0  # for one batch, tries included: the own receiver is near, or gone

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


def link(one: trace.Span, other: trace.Span) -> None:
    """Both ways, while neither has ended."""
    one.add_link(other.get_span_context())
    other.add_link(one.get_span_context())


def trace_id_of(span: trace.Span) -> str:
    """32 hex digits."""
    return format(span.get_span_context().trace_id, "032x")


class SpanSource:
    """Starts a process's spans of one clock, which their resource names."""

    def __init__(self, service: str, member: str, senders: Sequence[SpanSender], clock: str):
        resource = Resource.create(
            {
                "service.name": f"kvmesh-{service}",
                "service.instance.id": member,
                names.CLOCK: clock,
            }
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for sender in senders:
            self._provider.add_span_processor(sender)
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


class Telemetry(SpanSource):
    """One process's tracer of what it measures. Close it to flush what is still in memory.

    simulated: for spans whose times are those of a simulated device. They are traces of their own,
    linked with the measured ones.
    """

    def __init__(
        self, service: str, member: str, senders: Sequence[SpanSender] | None = None
    ) -> None:
        self._senders = tuple(senders or ())
        super().__init__(service, member, self._senders, "measured")
        self.simulated = SpanSource(service, member, self._senders, "simulated")

    @property
    def dropped(self) -> int:
        """Finished spans that went nowhere, over all receivers."""
        return sum(sender.dropped for sender in self._senders)


def senders(otlp: str, token: str = "") -> list[SpanSender]:
    """Where the environment says that this process's spans go; none if it says nothing.

    otlp: "join" or "replace", what the standard variables do to the mesh's own receiver.
    token: the mesh's, which its receiver asks for.
    """
    standard = any(os.environ.get(name) for name in OTLP_VARIABLES)
    own = os.environ.get(TRACES_VARIABLE, "")
    found: list[SpanSender] = []
    if own and not (standard and otlp == "replace"):
        found.append(SpanSender(_own(own, token), tell_losses=True))
    if standard:
        found.append(SpanSender(_standard()))
    return found


def _standard() -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _own(address: str, token: str) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(
        endpoint=address,
        insecure=True,
        headers={"authorization": f"Bearer {token}"} if token else None,
        timeout=EXPORT_S,
    )
