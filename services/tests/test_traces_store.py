"""The span store: what it keeps, finds, forgets, and what it does when it cannot."""

from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from trace_samples import START, request, trace_id

from kvmesh.services.common import names
from kvmesh.services.traces.inbox import Inbox
from kvmesh.services.traces.query import Filter
from kvmesh.services.traces.reader import SpanReader
from kvmesh.services.traces.store import Limits, SpanStore

LIMITS = Limits(64 << 20, 1e9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "t.sqlite"
    store = SpanStore(path, LIMITS)
    tenant = {"kvmesh.tenant": "acme", "note": "50%_off"}
    store.append(request("a", cached=832), {"received": 8})
    store.append(request("b", at=1_000, slow=3.0, attributes=tenant, status="ERROR"), {})
    twin = [{"trace_id": trace_id("a"), "span_id": "1" * 16, "attributes": {}}]
    store.append(request("c", at=2_000, clock="simulated", links=twin), {})
    store.close()
    return path


def found(path: Path, **wanted: object) -> list[str]:
    with SpanReader(path) as reader:
        traces = reader.newest(Filter(**wanted), 10)  # type: ignore[arg-type]
    return [bytes.fromhex(t.trace_id).rstrip(b"\0").decode() for t in traces]


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ({}, ["c", "b", "a"]),
        ({"service": "kvmesh-worker"}, ["c", "b", "a"]),
        ({"service": "kvmesh-kvcache"}, []),
        ({"status": "error"}, ["b"]),
        ({"status": "ok"}, ["c", "a"]),
        ({"model": "mini"}, ["c", "b", "a"]),
        ({"model": "maxi"}, []),
        ({"tenant": "acme"}, ["b"]),
        ({"min_ttft_s": 0.1}, ["b"]),
        ({"min_tpot_s": 0.01}, ["b"]),
        ({"min_duration_s": 0.2}, ["b"]),
        ({"clock": "simulated"}, ["c"]),
        ({"clock": "measured"}, ["b", "a"]),
        ({"clock": "mixed"}, []),
        ({"text": "ACME"}, ["b"]),
        ({"text": "50%_off"}, ["b"]),
        ({"text": "50__off"}, []),
    ],
)
def test_traces_store_filters(path: Path, wanted: dict[str, object], ids: list[str]) -> None:
    assert found(path, **wanted) == ids


def test_traces_store_figures_of_a_trace(path: Path) -> None:
    with SpanReader(path) as reader:
        trace = reader.summary(trace_id("a"))
        assert trace is not None
        assert (trace.name, trace.num_spans, trace.clock) == ("chat mini", 8, "measured")
        assert (trace.ttft_s, trace.cached_tokens, trace.duration_ms) == (0.05, 832, 100.0)
        assert trace.tpot_s == pytest.approx(0.005)
        assert trace.members == ("router", "worker-1")
        assert len(reader.spans(trace_id("a"))) == 8
        # A link is found from both of its ends.
        assert [t.trace_id for t in reader.linked(trace_id("a"))] == [trace_id("c")]
        assert [t.trace_id for t in reader.linked(trace_id("c"))] == [trace_id("a")]
        assert reader.find("last") == trace_id("a")  # whose simulated twin is the newest
        assert reader.simulated(trace_id("a")) == reader.simulated(trace_id("c")) == trace_id("c")
        assert reader.find(trace_id("b")[:3].upper()) == trace_id("b")
        for wanted, message in (("6", "fits several"), ("ff", "no trace ff")):
            with pytest.raises(LookupError, match=message):
                reader.find(wanted)


def test_traces_store_spans_that_come_late_or_twice(tmp_path: Path) -> None:
    spans = request("a")
    store = SpanStore(tmp_path / "t", LIMITS)
    for part in (spans[3:], spans[:3], spans[:5]):
        store.append(part, {})
    store.close()
    with SpanReader(tmp_path / "t") as reader:
        (trace,) = reader.newest(Filter(), 10)
    assert (trace.num_spans, trace.name, trace.ttft_s) == (8, "chat mini", 0.05)


def test_traces_store_forgets_by_age_and_by_bytes(tmp_path: Path) -> None:
    store = SpanStore(tmp_path / "t", Limits(256 << 10, 60.0))
    for number in range(200):
        store.append(request(f"{number:03d}", at=number * 1_000), {})
    assert store.used_bytes() > 256 << 10
    assert store.prune(START / 1e9 + 200 - 1e-3) > 0  # those of more than a minute ago
    store.close()
    with SpanReader(tmp_path / "t") as reader:
        kept = reader.newest(Filter(), 1_000)
    assert 0 < len(kept) <= 61
    assert kept[0].trace_id == trace_id("199")  # the newest stay
    assert [t.start_ns for t in kept] == sorted((t.start_ns for t in kept), reverse=True)
    assert (tmp_path / "t").stat().st_size <= 256 << 10


def otlp(count: int, name: str = "span") -> ExportTraceServiceRequest:
    made = ExportTraceServiceRequest()
    scope = made.resource_spans.add().scope_spans.add()
    for number in range(count):
        span = scope.spans.add(name=name, trace_id=bytes([1] * 16), start_time_unix_nano=START)
        span.span_id = (number + 1).to_bytes(8, "big")
    return made


def stored(path: Path) -> tuple[int, dict[str, int]]:
    with SpanReader(path) as reader:
        return len(reader.spans("01" * 16)), reader.counters()


def test_traces_inbox_stores_what_it_takes_and_counts_what_it_cannot(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    inbox = Inbox(path, LIMITS, lambda: START / 1e9, otlp(5).ByteSize() + 1)
    assert inbox.offer(otlp(5)) == 0
    assert inbox.offer(otlp(3)) == 3  # no room, and no waiting for it
    inbox.start()
    inbox.close()
    assert inbox.offer(otlp(2)) == 2
    assert stored(path) == (5, {"received": 8, "dropped_full": 3})


def test_traces_inbox_counts_what_senders_lost(tmp_path: Path) -> None:
    lost = otlp(1, names.SPAN_DROPPED)
    pair = lost.resource_spans[0].scope_spans[0].spans[0].attributes.add(key=names.DROPPED)
    pair.value.int_value = 7
    inbox = Inbox(tmp_path / "t", LIMITS, lambda: START / 1e9)
    inbox.offer(lost)
    inbox.start()
    inbox.close()
    assert stored(tmp_path / "t") == (0, {"received": 1, "dropped_sender": 7})


def test_traces_inbox_goes_on_without_a_store(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    inbox = Inbox(blocker / "t.sqlite", LIMITS, lambda: START / 1e9)
    inbox.offer(otlp(4))
    inbox.start()
    inbox.close()
    assert inbox.counts()["dropped_store"] == 4


def test_traces_inbox_sets_a_damaged_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    path.write_bytes(b"this is not a database" * 100)
    clock = iter(range(int(START / 1e9), int(START / 1e9) + 1_000, 10))
    inbox = Inbox(path, LIMITS, lambda: float(next(clock)))
    inbox.offer(otlp(4))
    inbox.offer(otlp(2))
    inbox.start()
    inbox.close()
    assert stored(path) == (2, {"received": 6, "dropped_store": 4})
    assert path.with_suffix(".damaged").exists()


def test_traces_reader_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SpanReader(tmp_path / "none")
