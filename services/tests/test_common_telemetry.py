import json
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SpanExportResult

from kvmesh.services.common.telemetry import (
    LocalSpanStore,
    Telemetry,
    context_of,
    extract,
    inject,
    trace_id_of,
)


@pytest.fixture(autouse=True)
def no_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def read(directory: Path) -> list[dict[str, object]]:
    lines = [x for f in sorted(directory.glob("*.jsonl")) for x in f.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_context_crosses_a_hop_and_spans_land_in_the_store(tmp_path: Path) -> None:
    here = Telemetry("router", "router", tmp_path)
    there = Telemetry("worker", "worker-0", tmp_path)
    root = here.start("chat mini", attributes={"a": (1, 2)})
    metadata = inject(context_of(root))
    assert [key for key, _ in metadata] == ["traceparent"]
    child = there.start("prefill", extract(metadata))
    child.add_event("step", {"n": 1})
    child.end()
    root.end()
    here.close()
    there.close()
    spans = {span["name"]: span for span in read(tmp_path)}
    assert spans["prefill"]["trace_id"] == spans["chat mini"]["trace_id"] == trace_id_of(root)
    assert spans["prefill"]["parent_id"] == spans["chat mini"]["span_id"]
    assert spans["prefill"]["service"] == "kvmesh-worker"
    assert spans["prefill"]["member"] == "worker-0"
    assert spans["chat mini"]["attributes"]["a"] == [1, 2]  # type: ignore[index]


def test_without_a_context_nothing_is_injected() -> None:
    assert inject() == ()
    assert inject(extract(None)) == ()


def test_the_store_is_bounded(tmp_path: Path) -> None:
    telemetry = Telemetry("x", "x")
    store = LocalSpanStore(tmp_path / "x.jsonl", max_bytes=4_000)
    for number in range(100):
        span = telemetry.start(f"span {number}")
        span.end()
        assert store.export([span]) is SpanExportResult.SUCCESS  # type: ignore[list-item]
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(sizes) == {"x.jsonl", "x.old.jsonl"}
    assert sum(sizes.values()) <= 8_000
    assert "span 99" in (tmp_path / "x.jsonl").read_text()
    telemetry.close()


def test_a_store_that_cannot_be_written_drops_and_counts(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    telemetry = Telemetry("x", "x")
    store = LocalSpanStore(blocker / "spans" / "x.jsonl")
    span = telemetry.start("lost")
    span.end()
    assert store.export([span]) is SpanExportResult.FAILURE  # type: ignore[list-item]
    assert store.dropped == 1
    telemetry.close()
