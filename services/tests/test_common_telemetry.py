"""Context over hops, and spans that are sent, or dropped and counted."""

import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from span_sink import SpanSink

from kvmesh.services.common import names
from kvmesh.services.common.span_sender import SpanSender
from kvmesh.services.common.telemetry import (
    OTLP_VARIABLES,
    TRACES_VARIABLE,
    Telemetry,
    context_of,
    extract,
    inject,
    senders,
    trace_id_of,
)


@pytest.fixture(autouse=True)
def no_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OTLP_VARIABLES, TRACES_VARIABLE):
        monkeypatch.delenv(name, raising=False)


class Held(SpanExporter):
    """Fails while `working` is false; waits, inside a call, until `gate` is set."""

    def __init__(self) -> None:
        self.working = True
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[ReadableSpan]] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        assert self.gate.wait(60)
        if not self.working:
            return SpanExportResult.FAILURE
        self.batches.append(list(spans))
        return SpanExportResult.SUCCESS


def say(telemetry: Telemetry, count: int) -> None:
    for number in range(count):
        telemetry.start(f"span {number}").end()


def test_context_crosses_a_hop_and_spans_arrive() -> None:
    sink = SpanSink()
    here = Telemetry("router", "router", sink.senders)
    there = Telemetry("worker", "worker-0", sink.senders)
    root = here.start("chat mini", attributes={"a": (1, 2)})
    metadata = inject(context_of(root))
    assert [key for key, _ in metadata] == ["traceparent"]
    child = there.start("prefill", extract(metadata))
    child.add_event("step", {"n": 1})
    child.end()
    root.end()
    here.close()
    there.close()
    spans = {span["name"]: span for span in sink.records}
    assert spans["prefill"]["trace_id"] == spans["chat mini"]["trace_id"] == trace_id_of(root)
    assert spans["prefill"]["parent_id"] == spans["chat mini"]["span_id"]
    assert spans["prefill"]["service"] == "kvmesh-worker"
    assert spans["prefill"]["member"] == "worker-0"
    assert spans["prefill"]["events"][0]["attributes"] == {"n": 1}
    assert spans["chat mini"]["attributes"]["a"] == [1, 2]


def test_without_a_context_nothing_is_injected() -> None:
    assert inject() == ()
    assert inject(extract(None)) == ()


def test_a_slow_receiver_holds_up_nobody_and_its_losses_are_counted_and_told() -> None:
    exporter = Held()
    exporter.gate.clear()
    sender = SpanSender(exporter, tell_losses=True, max_queue=10)
    telemetry = Telemetry("x", "x", [sender])
    say(telemetry, 1)
    assert exporter.entered.wait(60)  # its thread hangs in the exporter from here on
    say(telemetry, 25)
    assert telemetry.dropped == 15
    exporter.gate.set()
    assert sender.force_flush()
    telemetry.close()
    told = [span for batch in exporter.batches for span in batch if span.name == names.SPAN_DROPPED]
    assert [dict(span.attributes or {})[names.DROPPED] for span in told] == [15]
    assert sum(len(batch) for batch in exporter.batches) == 1 + 10 + 1


def test_a_receiver_that_is_gone_costs_spans_and_nothing_else() -> None:
    exporter = Held()
    exporter.working = False
    sender = SpanSender(exporter, tell_losses=True)
    telemetry = Telemetry("x", "x", [sender])
    say(telemetry, 3)
    assert sender.force_flush()
    assert telemetry.dropped == 3
    exporter.working = True
    say(telemetry, 1)
    telemetry.close()
    (batch,) = exporter.batches
    assert [span.name for span in batch] == ["span 0", names.SPAN_DROPPED]


@pytest.mark.parametrize(
    ("own", "standard", "otlp", "count"),
    [
        ("", "", "join", 0),
        ("127.0.0.1:1", "", "join", 1),
        ("127.0.0.1:1", "http://127.0.0.1:1", "join", 2),
        ("127.0.0.1:1", "http://127.0.0.1:1", "replace", 1),
        ("127.0.0.1:1", "", "replace", 1),
        ("", "http://127.0.0.1:1", "join", 1),
    ],
)
def test_the_standard_variable_joins_or_replaces(
    own: str, standard: str, otlp: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACES_VARIABLE, own)
    monkeypatch.setenv(OTLP_VARIABLES[0], standard)
    found = senders(otlp)
    for sender in found:
        sender.shutdown()
    assert len(found) == count
