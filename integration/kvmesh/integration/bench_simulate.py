"""The simulator against a live mesh: the same requests through both, in the same run.

The worker's estimate comes from its own steps. What services and RPCs add to them is measured with
other requests, one at a time and several at once, before the ones that count.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.base import Estimate
from kvmesh.integration.bench_serve import own_mesh
from kvmesh.integration.loadgen import RequestResult, closed_loop, open_loop, token_request
from kvmesh.integration.serve_report import tpot_s
from kvmesh.integration.simulate import (
    ClosedLoop,
    Load,
    Overheads,
    Scenario,
    WorkerPool,
    load_of,
    simulate,
)
from kvmesh.integration.simulate.record import RequestRecord
from kvmesh.integration.workload import TraceRequest, Workload, prompts
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.config import MeshConfig
from kvmesh.services.router.client import InferenceClient
from kvmesh.services.router.cost import CostModel
from kvmesh.v1 import common_pb2, inference_pb2

_PROBES = ((64, 1), (256, 1), (256, 64), (768, 16), (1536, 128))  # prompt and output tokens
_SEVERAL = 3  # in flight, of those that teach: about as many as then are, of those that count
# Requests: before all others; in each round of teaching, one at a time and several at once.
WARM, ALONE, TOGETHER = 48, 8, 24
PARTS = 4  # of the requests that count; a round before each, and one after


@dataclass(frozen=True, slots=True)
class FidelityPlan:
    """requests: that count. share: of the mesh's throughput, the rate that they come at."""

    requests: int = 200
    share: float = 0.4
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Compared:
    """Medians in seconds. simulated: beside measured of the same requests."""

    name: str
    measured_s: float
    simulated_s: float

    @property
    def error(self) -> float:
        return self.simulated_s / self.measured_s - 1


@dataclass(frozen=True, slots=True)
class Fidelity:
    """estimate: with what services and RPCs add to a step and to each of its sequences."""

    rate: float
    fitted: Estimate
    estimate: Estimate
    overheads: Overheads
    rows: tuple[Compared, ...]
    failed: int


async def bench_simulate(
    config: MeshConfig, plan: FidelityPlan, run_dir: Path, on_done: Callable[[], None]
) -> Fidelity:
    """Starts a mesh of one worker, learns its times, replays the requests in both.

    The requests that count come in parts, between those that teach: a machine's speed wanders.
    """
    async with own_mesh(config, run_dir) as client:
        side = _Live(client, config, (await client.list_models()).models[0].vocab_size, on_done)
        seen = _Seen()
        await side.closed(_requests(plan.seed, "warm", WARM), _SEVERAL)  # the estimate's own steps
        await side.learn(seen, plan.seed, 0)
        rate = plan.share * _throughput(seen.several[0].results)
        parts = _parts(plan, rate)
        live: list[RequestResult] = []
        for number, part in enumerate(parts, 1):
            live += await side.open(part)
            await side.learn(seen, plan.seed, number)
        scenario = await side.scenario(seen.estimate())
    told = _with_overheads(scenario, seen)
    records = [record for part in parts for record in simulate(told, part, plan.seed).records]
    done = [each for each in live if not each.error]
    assert told.estimate is not None
    rows = (
        _compared("TTFT", [r.ttft_s for r in done], [r.ttft_s for r in records]),
        _compared("TPOT", _tpots(done), [r.tpot_s for r in records]),
        _compared("request", [r.duration_s for r in done], [r.duration_s for r in records]),
    )
    return Fidelity(
        rate, seen.estimate(), told.estimate, told.overheads, rows, len(live) - len(done)
    )


@dataclass(frozen=True, slots=True)
class _Lesson:
    load: Workload
    results: list[RequestResult]


@dataclass(slots=True)
class _Seen:
    """Requests one at a time and several at once, and the estimate after each round of them."""

    alone: list[_Lesson] = field(default_factory=list)
    several: list[_Lesson] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)

    def estimate(self) -> Estimate:
        """The mean over the rounds."""
        rounds = self.estimates
        return Estimate(
            statistics.mean(each.base_s for each in rounds),
            statistics.mean(each.prefill_token_s for each in rounds),
            statistics.mean(each.decode_token_s for each in rounds),
            statistics.mean(each.context_token_s for each in rounds),
        )


def _parts(plan: FidelityPlan, rate: float) -> list[Workload]:
    every = _requests(plan.seed, "count", plan.requests).requests
    size = -(-plan.requests // PARTS)
    parts = [every[start : start + size] for start in range(0, plan.requests, size)]
    return [_poisson(Workload(part), rate, plan.seed + i) for i, part in enumerate(parts)]


class _Live:
    """A mesh that is measured."""

    def __init__(
        self, client: InferenceClient, config: MeshConfig, vocab: int, on_done: Callable[[], None]
    ) -> None:
        self._client = client
        self._config = config
        self._vocab = vocab
        self._on_done = on_done

    async def closed(self, load: Workload, concurrency: int) -> list[RequestResult]:
        return await closed_loop(
            self._client, self._sent(load), concurrency, lambda _: self._on_done()
        )

    async def open(self, load: Workload) -> list[RequestResult]:
        arrivals = [request.arrival_s for request in load.requests]
        return await open_loop(self._client, self._sent(load), arrivals, lambda _: self._on_done())

    def _sent(self, load: Workload) -> list[inference_pb2.GenerateRequest]:
        ids = prompts(load, self._vocab, 0)
        return [
            token_request(prompt, _greedy(request.output_tokens))
            for prompt, request in zip(ids, load.requests, strict=True)
        ]

    async def learn(self, seen: _Seen, seed: int, number: int) -> None:
        """One round of requests that teach."""
        alone = _requests(seed, f"alone/{number}", ALONE)
        several = _requests(seed, f"several/{number}", TOGETHER)
        seen.alone.append(_Lesson(alone, await self.closed(alone, 1)))
        seen.several.append(_Lesson(several, await self.closed(several, _SEVERAL)))
        seen.estimates.append(await self.fitted())

    async def fitted(self) -> Estimate:
        """The worker's estimate, read off what the router predicts with it for an idle worker."""
        rows: list[tuple[float, ...]] = []
        seconds: list[float] = []
        rng = random.Random("probes")
        step_tokens = CostModel().step_tokens
        for count, output in _PROBES:
            ids = [rng.randrange(self._vocab) for _ in range(count)]
            reply = await self._client.route(token_request(ids, _greedy(output)))
            chosen = reply.candidates[0]
            steps = math.ceil(count / step_tokens)
            rows.append((steps, count, 0, count * (count + 1) // 2))
            rows.append((output, 0, output, output * (count + output / 2)))
            seconds += [chosen.prefill_s, chosen.decode_s]
        solved = np.linalg.lstsq(np.array(rows, float), np.array(seconds), rcond=None)[0]
        base, prefill, decode, context = (max(0.0, float(value)) for value in solved)
        return Estimate(base, prefill, decode, context)

    async def scenario(self, estimate: Estimate) -> Scenario:
        workers = [m for m in (await self._client.status()).members if m.kind == "worker"]
        settings = self._config.workers[0]
        pool = WorkerPool(
            slots=settings.slots,
            step_tokens=settings.step_tokens,
            prefill_chunk=min(settings.prefill_chunk, settings.step_tokens),
        )
        shape = load_shape(self._config.model.name)
        return Scenario(shape, None, (pool,), estimate=estimate, kv_blocks=workers[0].blocks_total)


def _with_overheads(scenario: Scenario, seen: _Seen) -> Scenario:
    """Adds what services and RPCs take, so that requests one at a time and several at once come out
    as they were measured: to a step, to each of its sequences, to a prompt token, to a request."""
    for _ in range(4):  # what is added to one changes the others
        estimate = scenario.estimate
        assert estimate is not None
        one_s, several_s = (
            _tpot_gap(scenario, seen.alone, 1),
            _tpot_gap(scenario, seen.several, _SEVERAL),
        )
        each_s = (several_s - one_s) / (_SEVERAL - 1)
        token_s, request_s = _ttft_gap(scenario, seen.alone)
        estimate = replace(
            estimate,
            base_s=max(0.0, estimate.base_s + one_s - each_s),
            decode_token_s=max(0.0, estimate.decode_token_s + each_s),
            prefill_token_s=max(0.0, estimate.prefill_token_s + token_s),
        )
        late_s = max(0.0, scenario.overheads.request_s + request_s)
        scenario = replace(scenario, estimate=estimate, overheads=Overheads(request_s=late_s))
    return scenario


def _tpot_gap(scenario: Scenario, lessons: Sequence[_Lesson], running: int) -> float:
    """Measured less simulated, medians."""
    measured = [tpot for each in lessons for tpot in _tpots(each.results)]
    told = [record.tpot_s for record in _replayed(scenario, lessons, running)]
    return statistics.median(measured) - _median(told)


def _ttft_gap(scenario: Scenario, lessons: Sequence[_Lesson]) -> tuple[float, float]:
    """Measured less simulated of requests one at a time: (per prompt token, per request).

    By the median of the slopes between pairs (Theil and Sen), so that a stall does not tilt it.
    """
    results = [result for each in lessons for result in each.results]
    records = _replayed(scenario, lessons, 1)
    points = [
        (record.request.input_tokens, result.ttft_s - (record.ttft_s or 0.0))
        for record, result in zip(records, results, strict=True)
    ]
    slopes = [
        (b[1] - a[1]) / (b[0] - a[0])
        for a, b in itertools.combinations(points, 2)
        if abs(b[0] - a[0]) >= BLOCK_SIZE
    ]
    slope = statistics.median(slopes) if slopes else 0.0
    return slope, statistics.median(gap - slope * tokens for tokens, gap in points)


def _replayed(scenario: Scenario, lessons: Sequence[_Lesson], running: int) -> list[RequestRecord]:
    return [
        record
        for each in lessons
        for record in simulate(scenario, _loop(each.load, running)).records
    ]


def _median(values: Sequence[float | None]) -> float:
    return statistics.median(value for value in values if value is not None)


def _loop(load: Workload, running: int) -> Load:
    return load_of(load, 1 << 30, ClosedLoop(running))


def _requests(seed: int, salt: str, count: int) -> Workload:
    """Prompts of 64 to 512 tokens, outputs of 16 to 96, no block in common."""
    rng = random.Random(f"{seed}/{salt}")
    base = rng.randrange(1 << 40)
    return Workload(
        tuple(
            TraceRequest(0.0, rng.randint(64, 512), rng.randint(16, 96), (base + i,))
            for i in range(count)
        ),
        512,
    )


def _poisson(load: Workload, rate: float, seed: int) -> Workload:
    rng = random.Random(f"{seed}/arrivals")
    at, requests = 0.0, []
    for request in load.requests:
        requests.append(replace(request, arrival_s=at))
        at += rng.expovariate(rate)
    return replace(load, requests=tuple(requests))


def _throughput(results: Sequence[RequestResult]) -> float:
    begin = min(each.begin_s for each in results)
    end = max(each.begin_s + each.duration_s for each in results)
    return len(results) / (end - begin)


def _tpots(results: Sequence[RequestResult]) -> list[float]:
    return [tpot for each in results if (tpot := tpot_s(each)) is not None]


def _compared(name: str, measured: Sequence[float], simulated: Sequence[float | None]) -> Compared:
    return Compared(name, statistics.median(measured), _median(simulated))


def _greedy(output_tokens: int) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
