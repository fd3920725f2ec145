"""Traces, synthetic arrivals and the prompts made of them."""

import itertools
import json
import statistics
from typing import Any

import pytest

from kvmesh.integration.workload import (
    MOONCAKE_BLOCK,
    Shape,
    TraceError,
    TraceRequest,
    Workload,
    closed_loop_load,
    fitting,
    make_prompt,
    poisson_load,
    prompts,
    read_trace,
    scaled,
)

SEED = 11


def line(**changed: Any) -> str:
    record = {"timestamp": 1500, "input_length": 1000, "output_length": 20, "hash_ids": [0, 1]}
    return json.dumps({**record, **changed})


def test_workload_reads_a_trace_in_order_of_arrival():
    lines = [line(), "", line(timestamp=0, input_length=512, hash_ids=[0]), line(timestamp=9)]
    load = read_trace(lines)
    assert load.block_tokens == MOONCAKE_BLOCK
    assert [request.arrival_s for request in load.requests] == [0.0, 0.009, 1.5]
    assert load.requests[0] == TraceRequest(0.0, 512, 20, (0,))
    assert (load.duration_s, load.longest) == (1.5, 1020)
    assert len(read_trace(lines, limit=2).requests) == 2


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: an object is expected, not list"),
        (line(timestamp=-1), "line 2: timestamp must be a number from 0, is -1"),
        (line(timestamp=None), "line 2: timestamp must be a number from 0, is None"),
        (line(timestamp=True), "line 2: timestamp must be a number from 0, is True"),
        ('{"timestamp": NaN}', "line 2: timestamp must be a number from 0, is nan"),
        (line(input_length=0), "line 2: input_length must be an integer from 1, is 0"),
        (line(input_length=1.5), "line 2: input_length must be an integer from 1, is 1.5"),
        (line(output_length="7"), "line 2: output_length must be an integer from 1, is '7'"),
        (line(hash_ids="0"), "line 2: hash_ids must be a list of integers from 0, is '0'"),
        (line(hash_ids=[0, -1]), r"line 2: hash_ids must be a list of integers from 0"),
        (line(hash_ids=[0]), "line 2: hash_ids has 1 ids, input_length 1000 needs 2"),
    ],
)
def test_workload_names_line_and_field_of_what_is_wrong(bad: str, words: str):
    with pytest.raises(TraceError, match=words):
        read_trace([line(), bad], "t.jsonl")


def test_workload_without_requests():
    with pytest.raises(TraceError, match=r"t\.jsonl has no requests"):
        read_trace(["\n"], "t.jsonl")


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.03, 0.001])
def test_workload_scaled_keeps_the_prefix_structure(scale: float):
    load = Workload(
        tuple(
            TraceRequest(arrival, length, 100, tuple(range(-(-length // 512))))
            for arrival, length in ((0.0, 511), (1.0, 512), (2.0, 6758), (3.0, 20_000))
        )
    )
    small = scaled(load, scale, speed=4.0)
    for before, after in zip(load.requests, small.requests, strict=True):
        assert after.arrival_s == before.arrival_s / 4
        assert after.hash_ids == before.hash_ids  # no block is lost or halved by rounding
        assert len(after.hash_ids) == -(-after.input_tokens // small.block_tokens)
        wanted = before.input_tokens * small.block_tokens / 512
        assert wanted <= after.input_tokens < wanted + 1
        assert after.output_tokens == max(1, round(100 * scale))


def test_workload_factors_must_be_above_zero():
    load = Workload((TraceRequest(0.0, 1, 1, (0,)),))
    for scale, speed in ((0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="must be above 0"):
            scaled(load, scale, speed)


def test_workload_that_fits():
    load = Workload(tuple(TraceRequest(0.0, n, 10, (0,)) for n in (90, 91, 5)))
    kept, dropped = fitting(load, 100)
    assert [request.input_tokens for request in kept.requests] == [90, 5]
    assert dropped == 1


def test_workload_same_hash_ids_give_the_same_tokens_and_others_do_not():
    first = TraceRequest(0.0, 25, 1, (3, 4, 5))
    second = TraceRequest(0.0, 28, 1, (3, 4, 6))
    one, two = (make_prompt(request, 10, 1000, SEED) for request in (first, second))
    assert (len(one), len(two)) == (25, 28)
    assert one[:20] == two[:20]
    assert one[20:25] != two[20:25]
    assert all(0 <= token < 1000 for token in one + two)
    assert make_prompt(first, 10, 1000, SEED) == one
    assert make_prompt(first, 10, 1000, SEED + 1) != one


def test_workload_poisson_arrivals_have_the_rate_and_its_spread():
    load = poisson_load(Shape(), rate_per_s=20.0, count=4000, seed=SEED)
    times = [request.arrival_s for request in load.requests]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0.0
    # The mean of n exponential gaps has a standard error of mean / sqrt(n): here 1.6 %.
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.08), f"seed {SEED}"
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.12), f"seed {SEED}"
    assert load == poisson_load(Shape(), 20.0, 4000, SEED)
    assert load != poisson_load(Shape(), 20.0, 4000, SEED + 1)


def test_workload_closed_loop_is_there_at_once():
    load = closed_loop_load(Shape(64, 5), count=7, seed=SEED)
    assert {request.arrival_s for request in load.requests} == {0.0}
    made = list(prompts(load, 500, SEED))
    assert len({tuple(prompt) for prompt in made}) == 7
    assert {len(prompt) for prompt in made} == {64}


@pytest.mark.parametrize(("tokens", "shared"), [(100, 36), (128, 64), (7, 7), (9, 0), (101, 37)])
def test_workload_shared_prefixes(tokens: int, shared: int):
    shape = Shape(tokens, 1, shared, prefixes=3)
    made = list(prompts(closed_loop_load(shape, 60, SEED), 50_000, SEED))
    assert {len(prompt) for prompt in made} == {tokens}
    beginnings = {tuple(prompt[:shared]) for prompt in made}
    assert len(beginnings) == (3 if shared else 1)
    if shared < tokens:
        assert len({tuple(prompt[shared:]) for prompt in made}) == 60


def test_workload_shapes_that_cannot_be():
    with pytest.raises(ValueError, match=r"9 shared tokens, must be in 0\.\.8"):
        closed_loop_load(Shape(8, 1, 9), 1, SEED)
    with pytest.raises(ValueError, match="rate is 0"):
        poisson_load(Shape(), 0.0, 1, SEED)
