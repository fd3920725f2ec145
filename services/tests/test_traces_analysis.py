"""What the page says of a trace, against figures worked out by hand."""

import pytest
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from trace_samples import record, request

from kvmesh.services.traces.analysis import critical_path, decode_windows, kv_bytes, ttft_pieces
from kvmesh.services.traces.export import chrome_json, otlp_json
from kvmesh.services.traces.latency import latency
from kvmesh.services.traces.spans import Span, spans_of
from kvmesh.services.traces.summary import TraceSummary
from kvmesh.services.traces.view import trace_view


def spans(*records: dict[str, object]) -> list[Span]:
    return [Span(**r) for r in records]  # type: ignore[arg-type]


SAMPLE = spans(*request("a"))


def test_traces_ttft_pieces_add_up_and_do_not_overlap() -> None:
    pieces = {piece.name: piece.ms for piece in ttft_pieces(SAMPLE)}
    # Queue 9..18 less the fetch 10..16 in it; 7..9 belongs to no leg; prefill ends at 48 of 50.
    assert pieces == {
        "queue": 3.0, "tokenize": 5.0, "route": 2.0, "KV fetch": 6.0, "prefill": 30.0,
        "first step": 2.0, "other": 2.0,
    }  # fmt: skip
    assert sum(pieces.values()) == 50.0


def edge_trace() -> list[Span]:
    """A trace that an edge began, with two choices; the second one starts 20 ms later."""
    root = record("a", "POST /v1/completions", None, (-3, 130), member="gateway")
    priced = {"gen_ai.operation.name": "chat", "kvmesh.cost.usd": 0.25, "kvmesh.cost.kv_usd": 0.125}
    first, second = (request("a", at=at, attributes=priced) for at in (0.0, 20.0))
    for one in second:  # ids of their own
        one["span_id"] = "f" + one["span_id"][1:]
        one["parent_id"] = one["parent_id"] and "f" + one["parent_id"][1:]
    first[0]["parent_id"] = second[0]["parent_id"] = root["span_id"]
    return spans(root, *second, *first)


def test_traces_of_an_edge_show_the_first_choices_ttft_and_what_all_cost() -> None:
    traced = edge_trace()
    assert ttft_pieces(traced) == ttft_pieces(SAMPLE)
    view = trace_view(traced, None, [])
    assert view["cost"] == {"kvmesh.cost.usd": 0.5, "kvmesh.cost.kv_usd": 0.25}
    assert next(row["name"] for row in view["rows"] if row["critical"]) == "POST /v1/completions"


def test_traces_never_sum_simulated_with_measured() -> None:
    worker = {"member": "worker-1", "clock": "simulated"}
    twin = record("a", "prefill", "run", (0, 40), **worker)
    fetch = record("a", "kv fetch", "run", (0, 40), attributes={"kvmesh.kv.bytes": 9}, **worker)
    mixed = [*SAMPLE, *spans(twin, fetch)]
    assert ttft_pieces(mixed) == ttft_pieces(SAMPLE)
    assert kv_bytes(mixed) == kv_bytes(SAMPLE)
    assert kv_bytes(SAMPLE)["fetched_wire"] == 1000


def test_traces_critical_path_goes_back_from_the_end() -> None:
    path = critical_path(SAMPLE)
    assert [span.name for span in SAMPLE if span.span_id in path] == [
        "chat mini", "tokenize", "route", "run", "queue", "prefill", "decode",
    ]  # fmt: skip


def test_traces_decode_windows_show_the_stall() -> None:
    windows = decode_windows(SAMPLE)
    assert [(w.tokens, w.stall) for w in windows] == [
        (2, False), (2, False), (2, False), (2, True), (2, False),
    ]  # fmt: skip
    assert windows[3].longest_ms == pytest.approx(28.0)
    assert windows[3].token_ms == pytest.approx(15.0)


def test_traces_otlp_json_is_what_protobuf_reads() -> None:
    message = ParseDict(_base64_ids(otlp_json(SAMPLE)), ExportTraceServiceRequest())
    assert sorted(r["name"] for r in spans_of(message.resource_spans)) == sorted(
        span.name for span in SAMPLE
    )
    again = {r["span_id"]: r for r in spans_of(message.resource_spans)}
    assert [Span(**again[span.span_id]) for span in SAMPLE] == SAMPLE


def _base64_ids(value: object) -> object:
    """OTLP's JSON has ids in hex, where protobuf's own JSON has base64."""
    import base64

    if isinstance(value, dict):
        return {
            key: base64.b64encode(bytes.fromhex(item)).decode()
            if key in ("traceId", "spanId", "parentSpanId")
            else _base64_ids(item)
            for key, item in value.items()
        }
    return [_base64_ids(item) for item in value] if isinstance(value, list) else value


def test_traces_chrome_json_bars_of_a_row_never_cross() -> None:
    crossing = record("a", "kv put", "run", (40, 60), member="worker-1")
    events = chrome_json([*SAMPLE, *spans(crossing)])["traceEvents"]
    bars = [e for e in events if e["ph"] == "X"]
    assert len(bars) == len(SAMPLE) + 1
    for one in bars:
        for other in bars:
            if (one["pid"], one["tid"]) == (other["pid"], other["tid"]) and one["ts"] < other["ts"]:
                end, other_end = one["ts"] + one["dur"], other["ts"] + other["dur"]
                assert other["ts"] >= end or other_end <= end, (one, other)


def summary(number: int, clock: str) -> TraceSummary:
    return TraceSummary(
        trace_id=str(number), name="chat", start_ns=number * 10**9, duration_ms=float(number),
        num_spans=1, members=(), errors=0, is_request=True, clock=clock, ttft_s=number / 1e3,
    )  # fmt: skip


def test_traces_latency_is_of_one_clock_alone() -> None:
    traces = [summary(n, "measured") for n in range(1, 101)]
    slow = [summary(n * 1_000, "simulated") for n in range(1, 6)]
    mixed = [summary(10**6, "mixed")]
    found = latency([*traces, *slow, *mixed], "ttft", "measured")
    assert found["all"] == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert len(found["points"]) == 100
    assert len(latency([*traces, *slow, *mixed], "ttft", "simulated")["points"]) == 5
