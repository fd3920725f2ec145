"""`kvmesh bench edge` on a small mesh: what its figures say of each other."""

from pathlib import Path

import pytest
from meshes import mesh_config

from kvmesh.integration.bench_edge import EdgePlan, bench_edge
from kvmesh.services.common.config import GatewayConfig, WorkerConfig


async def test_both_edges_are_measured_and_abandoned_streams_give_their_blocks_back(
    tmp_path: Path,
) -> None:
    config = mesh_config([WorkerConfig(role="both")], gateway=GatewayConfig(port=0))
    plan = EdgePlan(concurrency=(1, 2), output_tokens=16, requests=2, abandons=2)
    done: list[None] = []
    found = await bench_edge(config, plan, tmp_path / "run", lambda: done.append(None))
    assert len(done) == plan.rounds == 7
    assert [(row.concurrency, row.pairs) for row in found.rows] == [(1, 2), (2, 1)]
    for row in found.rows:
        for side in (row.grpc, row.http):
            assert 0 < side.ttft_p50_ms <= side.ttft_p99_ms
            if side.all_us is not None and side.mesh_us is not None:
                assert side.all_us == pytest.approx(side.mesh_us + side.client_us, abs=0.2)
    assert [(row.streams, row.tries) for row in found.abandoned] == [(1, 2), (2, 2)]
    for abandoned in found.abandoned:
        assert abandoned.held_blocks > 0
        assert 0 < abandoned.median_ms <= abandoned.largest_ms
