"""A trace as a tree and as bars, against hand-made spans."""

import dataclasses

import pytest

from kvmesh.services.traces.spans import Span
from kvmesh.services.traces.tree import bar, total_ms, waterfall

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


def test_traces_tree_waterfall_is_the_tree_in_order_of_time():
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


def test_traces_tree_a_span_without_its_parent_still_shows():
    rows = waterfall([span("root", None, 0, 10), span("lost", "gone", 2, 3)])
    assert [(row.span.name, row.depth, row.detached) for row in rows] == [
        ("root", 0, False),
        ("lost", 0, True),
    ]


def test_traces_tree_survive_a_chain_deeper_than_the_stack():
    depth = 5_000
    chain = [span(str(i), str(i - 1) if i else None, i, i + 1) for i in range(depth)]
    assert waterfall(chain)[-1].depth == depth - 1


def test_traces_tree_a_ring_of_parents_still_shows():
    ring = [span("a", "b", 0, 2), span("b", "a", 1, 2), span("self", "self", 3, 4)]
    assert sorted(row.span.name for row in waterfall(ring)) == ["a", "b", "self"]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 100, (0, 40)), (50, 75, (20, 10)), (100, 100, (39, 1)), (99.9, 100, (39, 1))],
)
def test_traces_tree_bars_fit_the_line(start: float, end: float, expected: tuple[int, int]):
    rows = waterfall([span("root", None, 0, 100), span("leg", "root", start, end)])
    assert bar(rows[1], 100.0, 40) == expected


def test_traces_tree_of_no_length_have_a_bar():
    (row,) = waterfall([span("root", None, 0, 0)])
    assert bar(row, 0.0, 40) == (0, 40)
