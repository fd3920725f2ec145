"""`kvmesh bench simulate`: what the simulator predicts beside what a live mesh measures."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cli.errors import FAILED, CommandFailed
from kvmesh.cli.options import ConfigFile, Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, milliseconds, print_json, print_table


@command
async def simulate(
    config: ConfigFile = None,
    requests: Annotated[int, typer.Option(min=10, help="Replayed in both.")] = 200,
    share: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Of the mesh's throughput, as the rate.")
    ] = 0.4,
    seed: Annotated[int, typer.Option(help="Of lengths and arrivals.")] = 1,
    json: Json = False,
) -> None:
    """Replay requests on a live mesh of one worker and in the simulator, and compare medians."""
    import tempfile

    from kvmesh.integration.bench_simulate import (
        FULL,
        LESSON,
        ROUNDS,
        WARM,
        FidelityPlan,
        bench_simulate,
    )
    from kvmesh.integration.machine import describe_machine
    from kvmesh.services.common.config import GatewayConfig, WorkerConfig, load_config

    loaded = load_config(config)
    router = loaded.router.model_copy(update={"port": 0})
    workers = loaded.workers[:1] if config else (WorkerConfig(role="both"),)
    changed = {"workers": workers, "router": router, "gateway": GatewayConfig(enabled=False)}
    ready = loaded.model_copy(update=changed)
    plan = FidelityPlan(requests, share, seed)
    total = requests + WARM + FULL + 2 * ROUNDS * LESSON
    with (
        tempfile.TemporaryDirectory(prefix="kvmesh-bench-") as folder,
        progress_bar("requests", total, hidden=json) as advance,
    ):
        found = await bench_simulate(ready, plan, Path(folder), advance)
    machine = describe_machine()
    if json:
        rows = [{**asdict(row), "error": row.error} for row in found.rows]
        record = {"benchmark": "simulate", "machine": machine, "plan": asdict(plan)}
        print_json({**record, **asdict(found), "rows": rows})
    else:
        console().print(f"{machine}; {ready.model.name}; {requests} requests, {found.rate:.1f}/s")
        columns = ("median", ">measured", ">simulated", ">error")
        cells = [
            (row.name, milliseconds(row.measured_s), milliseconds(row.simulated_s),
             f"{row.error:+.1%}")
            for row in found.rows
        ]  # fmt: skip
        print_table("", columns, cells)
    if found.failed:
        raise CommandFailed(f"{found.failed} of {requests} requests failed", FAILED)
