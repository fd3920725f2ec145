"""Traces from span files, against hand-made spans."""

import dataclasses
import json
from pathlib import Path

import pytest
from kvmesh.integration.traces import (
    Span,
    bar,
    find_trace,
    load_spans,
    parse_spans,
    summarize,
    total_ms,
    waterfall,
)

MS = 1_000_000


def span(span_id: str, parent: str | None, start_ms: float, end_ms: float, **changes) -> Span:
    made = Span(
        trace_id="a" * 32,
        span_id=span_id,
        parent_id=parent,
        name=span_id,
        service="kvmesh-router",
        member="router",
        start_ns=int((1_000 + start_ms) * MS),
        end_ns=int((1_000 + end_ms) * MS),
        status="UNSET",
        status_message="",
        attributes={},
        events=[],
    )
    return dataclasses.replace(made, **changes)


REQUEST = [
    span("decode", "worker", 50, 90, service="kvmesh-worker", member="worker-1"),
    span("route", "root", 12, 13.5),
    span("root", None, 0, 100),
    span("worker", "root", 14, 95, service="kvmesh-worker", member="worker-1"),
    span("tokenize", "root", 1, 11),
    span("prefill", "worker", 15, 50, service="kvmesh-worker", member="worker-1"),
]


def test_launch_traces_waterfall_is_the_tree_in_order_of_time():
    rows = waterfall(REQUEST)
    assert [(row.span.name, row.depth, row.offset_ms, row.duration_ms) for row in rows] == [
        ("root", 0, 0.0, 100.0),
        ("tokenize", 1, 1.0, 10.0),
        ("route", 1, 12.0, 1.5),
        ("worker", 1, 14.0, 81.0),
        ("prefill", 2, 15.0, 35.0),
        ("decode", 2, 50.0, 40.0),
    ]
    assert not any(row.detached for row in rows)
    assert total_ms(rows) == 100.0


def test_launch_traces_a_span_without_its_parent_still_shows():
    rows = waterfall([span("root", None, 0, 10), span("lost", "gone", 2, 3)])
    assert [(row.span.name, row.depth, row.detached) for row in rows] == [
        ("root", 0, False),
        ("lost", 0, True),
    ]


def test_launch_traces_survive_a_chain_deeper_than_the_stack():
    depth = 5_000
    chain = [span(str(i), str(i - 1) if i else None, i, i + 1) for i in range(depth)]
    assert waterfall(chain)[-1].depth == depth - 1


def test_launch_traces_a_ring_of_parents_still_shows():
    ring = [span("a", "b", 0, 2), span("b", "a", 1, 2), span("self", "self", 3, 4)]
    assert sorted(row.span.name for row in waterfall(ring)) == ["a", "b", "self"]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 100, (0, 40)), (50, 75, (20, 10)), (100, 100, (39, 1)), (99.9, 100, (39, 1))],
)
def test_launch_traces_bars_fit_the_line(start: float, end: float, expected: tuple[int, int]):
    rows = waterfall([span("root", None, 0, 100), span("leg", "root", start, end)])
    assert bar(rows[1], 100.0, 40) == expected


def test_launch_traces_of_no_length_have_a_bar():
    (row,) = waterfall([span("root", None, 0, 0)])
    assert bar(row, 0.0, 40) == (0, 40)


def test_launch_traces_summary_counts_members_and_errors():
    late = span("other", None, 500, 501, trace_id="b" * 32, status="ERROR")
    newest, oldest = summarize([*REQUEST, late])
    assert (newest.trace_id, newest.errors) == ("b" * 32, 1)
    assert (oldest.name, oldest.duration_ms, oldest.num_spans) == ("root", 100.0, 6)
    assert (oldest.members, oldest.errors, oldest.is_request) == (("router", "worker-1"), 0, True)


def test_launch_traces_are_found_by_prefix_and_as_the_last():
    other = span("other", None, 500, 501, trace_id="ab" + "0" * 30)
    probe = span("probe", None, 600, 601, trace_id="c" * 32, service="kvmesh-worker")
    spans = [*REQUEST, other, probe]
    assert find_trace(spans, "last") == [other]
    assert find_trace(spans, "AB") == [other]
    assert len(find_trace(spans, "aa")) == 6
    with pytest.raises(LookupError, match="fits 2 traces"):
        find_trace(spans, "a")
    with pytest.raises(LookupError, match="no trace ff"):
        find_trace(spans, "ff")
    with pytest.raises(LookupError, match="no request is stored"):
        find_trace([], "last")


def test_launch_traces_are_read_from_all_files(tmp_path: Path):
    lines = [json.dumps(dataclasses.asdict(s)) for s in REQUEST]
    (tmp_path / "router.old.jsonl").write_text("\n".join(lines[:2]) + "\n")
    (tmp_path / "router.jsonl").write_text("\n".join(lines[2:4]) + "\n" + lines[4][:50])
    (tmp_path / "worker-1.jsonl").write_text(lines[5] + "\n")
    (tmp_path / "notes.txt").write_text("not spans")
    names = sorted(s.name for s in load_spans(tmp_path))
    assert names == ["decode", "prefill", "root", "route", "worker"]
    assert load_spans(tmp_path / "nothing") == []


def test_launch_traces_skip_what_is_no_span():
    assert parse_spans(["", "{}", "[1]", "null", '{"name": "x"}']) == []
