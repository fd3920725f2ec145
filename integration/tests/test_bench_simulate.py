"""The simulator beside a live mesh: that both are asked the same, not how close they come."""

from pathlib import Path

import pytest
from meshes import mesh_config

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.base import Estimate
from kvmesh.integration import bench_simulate
from kvmesh.integration.bench_simulate import FidelityPlan
from kvmesh.integration.loadgen import RequestResult
from kvmesh.integration.simulate import ClosedLoop, Scenario, load_of, simulate
from kvmesh.services.common.config import WorkerConfig
from kvmesh.v1 import inference_pb2

TRUE = Estimate(0.004, 0.0002, 0.0006, 1e-7)
GUESSED = Estimate(0.003, 0.00015, 0.0004, 1e-7)


def scenario_of(estimate: Estimate) -> Scenario:
    return Scenario(load_shape("mini"), None, estimate=estimate, kv_blocks=500)


def lesson(salt: str, count: int, running: int) -> bench_simulate._Lesson:
    """What a mesh whose steps take TRUE, and whose requests 10 ms more, would have measured."""
    load = bench_simulate._requests(1, salt, count)
    told = simulate(scenario_of(TRUE), load_of(load, 1 << 30, ClosedLoop(running)))
    results = []
    for record in told.records:
        assert record.ttft_s and record.duration_s
        usage = inference_pb2.Usage(completion_tokens=record.output_tokens)
        ends = [(record.ttft_s + 0.01, 1), (record.duration_s + 0.01, 1)]
        results.append(RequestResult(ttft_s=record.ttft_s + 0.01, token_s=ends, usage=usage))
    return bench_simulate._Lesson(load, results)


def test_what_a_mesh_adds_is_found() -> None:
    seen = bench_simulate._Seen([lesson("a", 12, 1)], [lesson("b", 40, 3)], [GUESSED])
    found = bench_simulate._with_overheads(scenario_of(seen.estimate()), seen)
    assert found.estimate is not None
    for running in (1, 3):
        assert found.estimate.base_s + running * found.estimate.decode_token_s == pytest.approx(
            TRUE.base_s + running * TRUE.decode_token_s, rel=0.05
        )
    assert found.estimate.prefill_token_s == pytest.approx(TRUE.prefill_token_s, rel=0.05)
    assert found.overheads.request_s == pytest.approx(0.010, abs=0.003)


async def test_a_mesh_and_its_simulation_are_asked_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WARM", 12), ("ALONE", 2), ("TOGETHER", 4), ("PARTS", 1)):
        monkeypatch.setattr(bench_simulate, name, value)
    config = mesh_config((WorkerConfig(role="both", slots=16, blocks=128),))
    done: list[None] = []
    found = await bench_simulate.bench_simulate(
        config, FidelityPlan(requests=10, share=0.8), tmp_path, lambda: done.append(None)
    )
    assert found.failed == 0
    assert len(done) == 12 + 2 * (2 + 4) + 10
    assert [row.name for row in found.rows] == ["TTFT", "TPOT", "request"]
    assert all(row.measured_s > 0 and row.simulated_s > 0 for row in found.rows)
    assert found.fitted.base_s >= 0 and found.fitted.prefill_token_s > 0
