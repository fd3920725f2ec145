"""The simulator beside a live mesh: that both are asked the same, not how close they come."""

from dataclasses import replace
from pathlib import Path

import pytest
from meshes import mesh_config

from kvmesh.integration import bench_lessons, bench_simulate
from kvmesh.integration.bench_simulate import FidelityPlan
from kvmesh.integration.loadgen import RequestResult
from kvmesh.services.common.config import WorkerConfig
from kvmesh.services.traces.spans import Span

SPAN = Span("t", "s", None, "", "", "", 0, 0, "UNSET", "", {}, [])


def test_delivery_is_what_lies_between_client_and_steps() -> None:
    legs = bench_lessons._legs(
        RequestResult(begin_s=1.0, token_s=[(0.100, 1), (0.500, 4)]),
        {
            name: replace(SPAN, start_ns=start, end_ns=end)
            for name, start, end in (
                ("queue", 2_012_000_000, 2_013_000_000),
                ("prefill", 2_013_000_000, 2_090_000_000),
                ("decode", 2_090_000_000, 2_498_000_000),
            )
        },
        offset_ns=1_000_000_000,
    )
    assert legs == pytest.approx((0.012, 0.010, 0.002))


async def test_a_mesh_and_its_simulation_are_asked_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WARM", 8), ("FULL", 4), ("LESSON", 5), ("ROUNDS", 1)):
        monkeypatch.setattr(bench_simulate, name, value)
    config = mesh_config((WorkerConfig(role="both", slots=16, blocks=128),))
    done: list[None] = []
    found = await bench_simulate.bench_simulate(
        config, FidelityPlan(requests=10, share=0.8), tmp_path, lambda: done.append(None)
    )
    assert found.failed == 0
    assert len(done) == (8 + 4) + 2 * 5 + 10
    assert [row.name for row in found.rows] == ["TTFT", "TPOT", "request"]
    assert all(row.measured_s > 0 and row.simulated_s > 0 for row in found.rows)
    assert found.estimate.base_s >= 0 and found.estimate.prefill_token_s > 0
    assert found.overheads.request_s > 0
