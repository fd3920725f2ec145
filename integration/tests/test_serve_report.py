"""Sending a load, and what is said of it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from kvmesh.integration.loadgen import RequestResult, closed_loop, open_loop, token_request
from kvmesh.integration.serve_report import Limits, report, spread, within
from kvmesh.services.common.errors import Overloaded
from kvmesh.v1 import common_pb2, inference_pb2

STOP = common_pb2.FINISH_REASON_STOP


def result(begin: float, times: list[float], prompt: int = 100, **more: Any) -> RequestResult:
    """A finished request that got one token at each of `times` after it was due."""
    usage = inference_pb2.Usage(prompt_tokens=prompt, completion_tokens=len(times))
    return RequestResult(
        begin_s=begin, ttft_s=times[0], duration_s=times[-1], usage=usage,
        token_s=[(at, 1) for at in times], **more,
    )  # fmt: skip


def test_report_of_two_requests():
    first, second = result(10.0, [0.1, 0.2, 0.4]), result(10.5, [0.3, 0.4, 0.5, 1.5])
    second.usage.cached_tokens = 64
    failed = RequestResult(begin_s=10.2, duration_s=0.1, error="Overloaded: full")
    said = report([first, second, failed], Limits(ttft_s=0.2, itl_s=0.5))
    assert said.seconds == pytest.approx(2.0)  # from 10.0 to 12.0
    assert (said.requests, said.finished, said.errors) == (3, 2, {"Overloaded": 1})
    assert (said.input_tokens, said.cached_tokens, said.output_tokens) == (200, 64, 7)
    assert said.output_tokens_per_s == pytest.approx(3.5)
    assert said.total_tokens_per_s == pytest.approx(103.5)
    assert said.requests_per_s == pytest.approx(1.0)
    assert (said.good, said.goodput_per_s) == (1, pytest.approx(0.5))
    assert said.ttft.mean == pytest.approx(0.2)
    assert said.tpot.mean == pytest.approx((0.15 + 0.4) / 2)
    assert said.itl.max == pytest.approx(1.0)
    assert said.itl.p50 == pytest.approx(0.1)
    assert (said.device_s, said.cost_usd, said.usd_per_million_tokens) == (None, None, None)


def test_report_limits_each_count():
    seen = result(0.0, [0.1, 0.2, 0.7])
    assert within(seen, Limits())
    assert within(seen, Limits(0.1, 0.3, 0.5, 0.7))
    for limits in (Limits(0.09), Limits(None, 0.29), Limits(itl_s=0.49), Limits(duration_s=0.69)):
        assert not within(seen, limits)
    assert within(result(0.0, [0.1]), Limits(tpot_s=0.0, itl_s=0.0))


def test_report_of_failures_alone_has_no_latencies():
    said = report([RequestResult(begin_s=1.0, duration_s=0.5, error="Unavailable: x")], Limits())
    assert (said.finished, said.goodput_per_s, said.ttft.p99) == (0, 0.0, None)
    with pytest.raises(ValueError, match="no request was sent"):
        report([], Limits())


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 1000])
def test_report_percentiles_are_the_nearest_rank(count: int):
    values = np.random.default_rng(count).random(count)
    said = spread(list(values))
    for share, own in ((0.5, said.p50), (0.9, said.p90), (0.95, said.p95), (0.99, said.p99)):
        assert own == np.quantile(values, share, method="inverted_cdf")
    assert said.max == values.max()
    assert said.mean == pytest.approx(values.mean())


class FakeClient:
    """Answers two tokens; refuses requests whose prompt is [0]; counts those at once."""

    def __init__(self) -> None:
        self.active = self.most = 0
        self.begun: list[int] = []

    async def generate(self, request: Any, timeout_s: Any = None) -> AsyncIterator[Any]:
        first = request.tokens.ids[0]
        self.begun.append(first)
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await asyncio.sleep(0)
            if not first:
                raise Overloaded("full")
            yield inference_pb2.GenerateResponse(text="a", token_ids=[first])
            usage = inference_pb2.Usage(completion_tokens=2)
            yield inference_pb2.GenerateResponse(
                text="b", token_ids=[2], finish_reason=STOP, usage=usage
            )
        finally:
            self.active -= 1


def load(*firsts: int) -> list[inference_pb2.GenerateRequest]:
    return [token_request([first], common_pb2.SamplingParams(max_tokens=2)) for first in firsts]


async def test_loadgen_closed_loop_keeps_so_many_in_flight():
    client: Any = FakeClient()
    results = await closed_loop(client, load(1, 2, 3, 4, 5), concurrency=2)
    assert client.most == 2
    assert [found.token_ids[0] for found in results] == [1, 2, 3, 4, 5]
    assert [tokens for _, tokens in results[0].token_s] == [1, 1]


async def test_loadgen_open_loop_times_from_when_a_request_was_due():
    client: Any = FakeClient()
    done: list[RequestResult] = []
    results = await open_loop(client, load(3, 0, 2), [0.02, 0.0, 0.01], done.append)
    assert client.begun == [0, 2, 3]  # by their times, whatever became of those before
    assert [found.error for found in results] == ["", "Overloaded: full", ""]
    assert len(done) == 3
    assert results[0].begin_s - results[1].begin_s == pytest.approx(0.02)
    for found in results:
        assert found.late_s >= 0.0
        assert found.duration_s >= found.late_s


def test_report_keeps_simulated_and_measured_apart():
    simulated = inference_pb2.Usage(
        completion_tokens=3, cost_kind="simulated", device_s=0.5, cost_usd=0.003,
        simulated_ttft_s=0.01, simulated_duration_s=0.05,
    )  # fmt: skip
    result = RequestResult(
        ttft_s=1.0, duration_s=2.0, usage=simulated, token_s=[(1.0, 1), (2.0, 2)], begin_s=0.0
    )
    said = report([result], Limits())
    assert (said.cost_kind, said.device_s, said.cost_usd) == ("simulated", 0.5, 0.003)
    assert said.usd_per_million_tokens == pytest.approx(1000.0)
    assert (said.ttft.p50, said.simulated_ttft.p50) == (1.0, 0.01)
    assert said.simulated_tpot.p50 == pytest.approx(0.02)
    measured = inference_pb2.Usage(completion_tokens=3, cost_kind="measured", device_s=1.0)
    both = report([result, RequestResult(ttft_s=1.0, duration_s=2.0, usage=measured)], Limits())
    assert (both.cost_kind, both.device_s, both.cost_usd) == ("mixed", None, None)
    assert both.simulated_ttft.p50 == 0.01
