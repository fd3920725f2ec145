"""The simulator against a live mesh: the same requests through both, in the same run.

All that the simulator is told is learnt before and after them, from other requests that come in the
same way (see bench_lessons).
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.base import Estimate
from kvmesh.integration.bench_lessons import (
    SEVERAL,
    LiveMesh,
    delivery,
    lesson_requests,
    mean_estimate,
)
from kvmesh.integration.bench_serve import own_mesh
from kvmesh.integration.launch_state import traces_path
from kvmesh.integration.loadgen import RequestResult
from kvmesh.integration.serve_report import tpot_s
from kvmesh.integration.simulate import Overheads, Scenario, WorkerPool, simulate
from kvmesh.integration.workload import Workload
from kvmesh.services.common.config import MeshConfig

# Requests before all others, those that show the throughput, and those of a round of teaching.
WARM, FULL, LESSON = 48, 48, 24
ROUNDS = 3  # before the replay, and as many after it: the machine's speed drifts


@dataclass(frozen=True, slots=True)
class FidelityPlan:
    """requests: that count. share: of the mesh's throughput, the rate that they come at."""

    requests: int = 200
    share: float = 0.4
    seed: int = 1


@dataclass(slots=True)
class _Lessons:
    """What the mesh was seen to do."""

    results: list[RequestResult] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)


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
    """estimate: of the worker's rounds. overheads: of services and RPCs, by the spans."""

    rate: float
    estimate: Estimate
    overheads: Overheads
    rows: tuple[Compared, ...]
    failed: int


async def bench_simulate(
    config: MeshConfig, plan: FidelityPlan, run_dir: Path, on_done: Callable[[], None]
) -> Fidelity:
    """Starts a mesh of one worker, learns its times, replays the requests in both."""
    async with own_mesh(config, run_dir) as client:
        vocab = (await client.list_models()).models[0].vocab_size
        mesh = LiveMesh(client, vocab, on_done)
        await mesh.closed(lesson_requests(plan.seed, "warm", WARM), SEVERAL)
        full = await mesh.closed(lesson_requests(plan.seed, "full", FULL), SEVERAL)
        rate = plan.share * _throughput(full)
        lessons = _Lessons()
        await _teach(mesh, lessons, rate, f"{plan.seed}/before")
        load = _poisson(lesson_requests(plan.seed, "count", plan.requests), rate, f"{plan.seed}")
        live = await mesh.open(load)
        await _teach(mesh, lessons, rate, f"{plan.seed}/after")
        overheads = await delivery(traces_path(run_dir), lessons.results)
        blocks = await mesh.kv_blocks()
    estimate = mean_estimate(lessons.estimates)
    scenario = _scenario(config, estimate, overheads, blocks)
    records = simulate(scenario, load, plan.seed).records
    done = [each for each in live if not each.error]
    rows = (
        _compared("TTFT", [r.ttft_s for r in done], [r.ttft_s for r in records]),
        _compared("TPOT", _tpots(done), [r.tpot_s for r in records]),
        _compared("request", [r.duration_s for r in done], [r.duration_s for r in records]),
    )
    return Fidelity(rate, estimate, overheads, rows, len(live) - len(done))


async def _teach(mesh: LiveMesh, lessons: _Lessons, rate: float, salt: str) -> None:
    """At the replay's own rate: a round waits for whatever else the process has to do, and how much
    that is depends on what comes and goes beside it."""
    for number in range(ROUNDS):
        load = lesson_requests(salt, f"{number}", LESSON)
        lessons.results += await mesh.open(_poisson(load, rate, f"{salt}/{number}"))
        lessons.estimates.append(await mesh.estimate())


def _scenario(
    config: MeshConfig, estimate: Estimate, overheads: Overheads, kv_blocks: int
) -> Scenario:
    settings = config.workers[0]
    pool = WorkerPool(
        slots=settings.slots,
        step_tokens=settings.step_tokens,
        prefill_chunk=min(settings.prefill_chunk, settings.step_tokens),
    )
    shape = load_shape(config.model.name)
    return Scenario(
        shape, None, (pool,), overheads=overheads, estimate=estimate, kv_blocks=kv_blocks
    )


def _poisson(load: Workload, rate: float, seed: str) -> Workload:
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
    known = [value for value in simulated if value is not None]
    return Compared(name, statistics.median(measured), statistics.median(known))
