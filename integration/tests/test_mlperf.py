"""MLPerf's LoadGen: its schedule worked out again, and the real one in front of a live mesh."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from meshes import inference, mesh_config

from kvmesh.integration.launch import running_mesh
from kvmesh.integration.mlperf.run import (
    MlperfError,
    MlperfPlan,
    load_loadgen,
    read_log,
    run_mlperf,
)
from kvmesh.integration.mlperf.schedule import SCHEDULE_SEED, arrivals
from kvmesh.integration.mlperf.sut import MeshSut
from kvmesh.integration.planning.traffic import load_workload
from kvmesh.services.common.config import WorkerConfig
from kvmesh.services.common.errors import Unavailable
from kvmesh.v1 import inference_pb2

QPS, COUNT = 2000.0, 300


def schedule_of_loadgen(loadgen: Any, folder: Path) -> tuple[int, int]:
    """(queries, nanoseconds of the schedule) that LoadGen generates for QPS."""

    def issue(queries: list[Any]) -> None:
        for query in queries:
            answer = loadgen.QuerySampleResponse(query.id, 0, 0, 1)
            loadgen.FirstTokenComplete([answer])
            loadgen.QuerySamplesComplete([answer])

    settings = loadgen.TestSettings()
    settings.scenario, settings.mode = loadgen.TestScenario.Server, loadgen.TestMode.PerformanceOnly
    settings.server_target_qps, settings.schedule_rng_seed = QPS, SCHEDULE_SEED
    settings.min_duration_ms, settings.min_query_count = 1, COUNT
    settings.use_token_latencies = True
    output, log = loadgen.LogOutputSettings(), loadgen.LogSettings()
    output.outdir, output.copy_summary_to_stdout = str(folder), False
    log.log_output, log.enable_trace = output, False
    handle = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(10, 10, lambda _: None, lambda _: None)
    loadgen.StartTestWithLogSettings(handle, library, settings, log)
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(handle)
    found = {}
    for line in (folder / "mlperf_log_detail.txt").read_text().splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        found[entry["key"]] = entry["value"]
    return found["generated_query_count"], found["generated_query_duration"]


def test_the_schedule_is_loadgens(tmp_path: Path) -> None:
    loadgen = pytest.importorskip("mlperf_loadgen")
    count, nanoseconds = schedule_of_loadgen(loadgen, tmp_path)
    assert count >= COUNT
    # LoadGen cuts each gap to whole nanoseconds, and counts the gap after the last query too.
    assert arrivals(QPS, count + 1)[-1] * 1e9 == pytest.approx(nanoseconds, abs=count)


def test_arrivals_are_poisson() -> None:
    times = arrivals(50.0, 20001)
    assert times[0] == 0
    gaps = times[1:] - times[:-1]
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)
    assert arrivals(100.0, 20001)[-1] == pytest.approx(times[-1] / 2)
    with pytest.raises(ValueError, match="qps is 0"):
        arrivals(0.0, 5)


class _Broken:
    """A mesh that gives up after one token, or at once."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    async def generate(self, request: inference_pb2.GenerateRequest) -> AsyncIterator[Any]:
        if self._tokens:
            yield inference_pb2.GenerateResponse(token_ids=self._tokens)
        raise Unavailable("no worker is there")


@pytest.mark.parametrize("tokens", [[], [5]])
async def test_a_query_that_fails_is_completed_and_counted(tokens: list[int]) -> None:
    calls: list[tuple[str, int]] = []
    done = asyncio.Event()

    def complete(name: str) -> Any:
        return lambda answers: calls.append((name, answers[0].id))

    fake = SimpleNamespace(
        QuerySampleResponse=lambda id_, *rest: SimpleNamespace(id=id_, rest=rest),
        FirstTokenComplete=complete("first"),
        QuerySamplesComplete=complete("all"),
    )
    client: Any = _Broken(tokens)
    sut = MeshSut(client, [inference_pb2.GenerateRequest()], 1, done.set, fake)
    sut.issue([SimpleNamespace(id=77, index=0)])
    await asyncio.wait_for(done.wait(), 10)
    assert calls == [("first", 77), ("all", 77)]
    assert [each.error for each in sut.failed] == ["Unavailable: no worker is there"]


async def test_loadgen_drives_a_mesh(tmp_path: Path) -> None:
    load_or_skip()
    worker = WorkerConfig(role="both", slots=16, blocks=64)
    async with running_mesh(mesh_config((worker,)), tmp_path / "mesh") as mesh:
        await mesh.wait_ready(120)
        async with inference(mesh) as client:
            for scenario, samples in (("offline", 12), ("server", 8)):
                plan = MlperfPlan(
                    load_workload(f"mlperf-llama-3.1-8b:{scenario}"),
                    qps=8.0,
                    min_seconds=1.0,
                    samples=samples,
                    scale=0.05,
                )
                logs = tmp_path / scenario
                logs.mkdir()
                told: list[int] = []
                found = await run_mlperf(client, plan, logs, told.append, lambda: None)
                assert found.scenario == scenario and not found.simulated
                assert found.failed == ()
                assert found.issued >= samples and len(told) == 1
                assert found.loadgen["tokens_per_s"] > 0
                assert found.loadgen["loadgen_errors"] == 0
                assert (logs / "mlperf_log_summary.txt").is_file()
            assert found.loadgen["queries"] == found.issued
            assert 0 < found.loadgen["ttft_p50_ns"] <= found.loadgen["ttft_p99_ns"]
            assert found.loadgen["tpot_p99_ns"] > 0
            with pytest.raises(MlperfError, match="make them shorter with --scale"):
                large = MlperfPlan(load_workload("mlperf-llama-3.1-405b"), scale=4.0)
                await run_mlperf(client, large, tmp_path, told.append, lambda: None)


def load_or_skip() -> None:
    try:
        load_loadgen()
    except MlperfError as error:
        pytest.skip(str(error))


def test_a_log_s_figures_have_short_names() -> None:
    lines = [
        ':::MLLOG {"key": "result_validity", "value": "VALID"}',
        "something else",
        ':::MLLOG {"key": "result_first_token_99.00_percentile_latency_ns", "value": 5}',
        ':::MLLOG {"key": "unknown", "value": 5}',
    ]
    assert read_log(lines) == {"validity": "VALID", "ttft_p99_ns": 5}
