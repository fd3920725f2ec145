"""Runs LoadGen on a mesh, and reads what it found."""

import asyncio
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvmesh.integration.loadgen import greedy, token_request
from kvmesh.integration.mlperf.schedule import QSL_SEED, SAMPLE_SEED, SCHEDULE_SEED
from kvmesh.integration.mlperf.sut import MeshSut
from kvmesh.integration.planning import traffic
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import inference_pb2

SCENARIOS = ("offline", "server", "interactive")
_MARK = ":::MLLOG "
_WANTED = {
    "result_validity": "validity",
    "result_perf_constraints_met": "limits_met",
    "result_min_duration_met": "min_duration_met",
    "early_stopping_met": "early_stopping_met",
    "result_completed_samples_per_sec": "samples_per_s",
    "result_completed_tokens_per_second": "tokens_per_s",
    "result_tokens_per_second": "tokens_per_s",
    "result_samples_per_second": "samples_per_s",
    "result_scheduled_samples_per_sec": "scheduled_samples_per_s",
    "result_first_token_50.00_percentile_latency_ns": "ttft_p50_ns",
    "result_first_token_99.00_percentile_latency_ns": "ttft_p99_ns",
    "result_time_per_output_token_50.00_percentile_ns": "tpot_p50_ns",
    "result_time_per_output_token_99.00_percentile_ns": "tpot_p99_ns",
    "result_query_count": "queries",
    "num_errors": "loadgen_errors",
}


class MlperfError(ConfigError):
    """A scenario that cannot be run; the message names the value, its limit and the next step."""


@dataclass(frozen=True, slots=True)
class MlperfPlan:
    """workload: whose lengths and limits count, with the scenario chosen. qps: of server and
    interactive. samples: in the library. scale: of all lengths, as small models have a small
    context. most: requests in flight of offline, where all are there at once."""

    workload: traffic.Workload
    qps: float = 1.0
    min_seconds: float = 30.0
    samples: int = 64
    scale: float = 1.0
    most: int = 128
    seed: int = 1


@dataclass(frozen=True, slots=True)
class MlperfRun:
    """loadgen: figures of its own log, by name. failed: requests that the mesh did not answer;
    LoadGen knows none, so a run that has some is not valid whatever it says."""

    scenario: str
    model: str
    loadgen: dict[str, Any]
    issued: int
    failed: tuple[str, ...]
    simulated: bool

    @property
    def valid(self) -> bool:
        return self.loadgen.get("validity") == "VALID" and not self.failed


def load_loadgen() -> Any:
    """MLPerf's LoadGen. Raises MlperfError if it is not installed."""
    try:
        return importlib.import_module("mlperf_loadgen")
    except ImportError as error:
        raise MlperfError(
            "MLPerf's LoadGen is not installed; pip install 'kvmesh[mlperf]' (mlcommons-loadgen)"
        ) from error


async def run_mlperf(
    client: InferenceClient,
    plan: MlperfPlan,
    logs: Path,
    on_start: Callable[[int], None],
    on_done: Callable[[], None],
) -> MlperfRun:
    """One performance run; LoadGen's logs go to `logs`. on_start gets a guess of the queries.

    Raises MlperfError for what cannot be run, MeshError if the mesh does not say what it serves.
    """
    loadgen = load_loadgen()
    model = (await client.list_models()).models[0]
    members = (await client.status()).members
    requests = _library(plan, model)
    offline = plan.workload.default == "offline"
    on_start(len(requests) if offline else round(plan.qps * plan.min_seconds))
    sut = MeshSut(client, requests, plan.most if offline else None, on_done, loadgen)
    await asyncio.to_thread(_test, loadgen, sut, plan, logs)
    return MlperfRun(
        plan.workload.default,
        model.name,
        read_log((logs / "mlperf_log_detail.txt").read_text().splitlines()),
        len(sut.issued),
        tuple(each.error for each in sut.failed),
        any(member.simulated for member in members),
    )


def _library(
    plan: MlperfPlan, model: inference_pb2.ModelInfo
) -> list[inference_pb2.GenerateRequest]:
    """Prompts of random tokens: what is said does not matter, its length does."""
    rng = np.random.default_rng(plan.seed)
    inputs = plan.workload.input.draw(rng, plan.samples) * plan.scale
    outputs = plan.workload.output.draw(rng, plan.samples) * plan.scale
    requests = []
    for given, said in zip(inputs, outputs, strict=True):
        prompt, output = max(1, round(given)), max(2, round(said))
        if prompt + output > model.max_context:
            raise MlperfError(
                f"a sample has {prompt} + {output} tokens, the context of {model.name} holds "
                f"{model.max_context}; make them shorter with --scale"
            )
        ids = rng.integers(0, model.vocab_size, prompt).tolist()
        requests.append(token_request(ids, greedy(output)))
    return requests


def _test(loadgen: Any, sut: MeshSut, plan: MlperfPlan, logs: Path) -> None:
    """Blocks until LoadGen has all answers."""
    output, log = loadgen.LogOutputSettings(), loadgen.LogSettings()
    output.outdir = str(logs)
    output.copy_summary_to_stdout = False
    log.log_output, log.enable_trace = output, False

    def nothing(_: Sequence[int]) -> None:
        pass

    handle = loadgen.ConstructSUT(sut.issue, sut.flush)
    library = loadgen.ConstructQSL(plan.samples, plan.samples, nothing, nothing)
    try:
        loadgen.StartTestWithLogSettings(handle, library, settings_of(loadgen, plan), log)
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(handle)


def settings_of(loadgen: Any, plan: MlperfPlan) -> Any:
    """As mlperf.conf has them, but for the duration, which is 600 s there."""
    scenario = plan.workload.scenario
    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.use_token_latencies = True
    settings.sample_concatenate_permutation = True
    settings.qsl_rng_seed, settings.sample_index_rng_seed = QSL_SEED, SAMPLE_SEED
    settings.schedule_rng_seed = SCHEDULE_SEED
    settings.min_duration_ms = round(plan.min_seconds * 1000)
    if plan.workload.default == "offline":
        settings.scenario = loadgen.TestScenario.Offline
        settings.offline_expected_qps = plan.qps
        settings.min_duration_ms = 0
        settings.min_query_count = plan.samples
        return settings
    settings.scenario = loadgen.TestScenario.Server
    settings.server_target_qps = plan.qps
    settings.server_target_latency_percentile = 0.99
    settings.min_query_count = min(plan.samples, max(1, round(plan.qps * plan.min_seconds)))
    settings.ttft_latency = round((scenario.ttft_ms or 0) * 1e6)
    settings.tpot_latency = round((scenario.tpot_ms or 0) * 1e6)
    return settings


def read_log(lines: Sequence[str]) -> dict[str, Any]:
    """The figures of mlperf_log_detail.txt that are shown, by short names."""
    found: dict[str, Any] = {}
    for line in lines:
        if line.startswith(_MARK):
            entry = json.loads(line[len(_MARK) :])
            name = _WANTED.get(entry["key"])
            if name is not None:
                found[name] = entry["value"]
    return found
