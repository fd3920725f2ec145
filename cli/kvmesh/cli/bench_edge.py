"""`kvmesh bench edge`: what the HTTP edge adds beside direct gRPC."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.options import ConfigFile, Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.bench_abandon import AbandonRow
    from kvmesh.integration.bench_edge import EdgeRow
    from kvmesh.integration.estimate import Estimate

Concurrency = Annotated[str, typer.Option(help="Requests in flight, comma-separated.")]
Requests = Annotated[
    int, typer.Option(min=1, help="Requests over each side, in pairs of as many as are in flight.")
]
Abandons = Annotated[
    int, typer.Option(min=0, help="How often that many streams are opened and abandoned.")
]


@command
async def edge(
    config: ConfigFile = None,
    concurrency: Concurrency = "1,4,16",
    requests: Requests = 256,
    abandons: Abandons = 20,
    json: Json = False,
) -> None:
    """TTFT and cost of a token over HTTP, beside direct gRPC, in one run on one mesh.

    And how soon the blocks of streams are free whose client goes away.

    Without --config the mesh has one worker that does both phases.
    """
    import tempfile

    from kvmesh.integration.bench_edge import EdgePlan, bench_edge
    from kvmesh.integration.machine import describe_machine
    from kvmesh.services.common.config import GatewayConfig, WorkerConfig, load_config

    loaded = load_config(config)
    changed: dict[str, object] = {
        "router": loaded.router.model_copy(update={"port": 0}),
        "gateway": GatewayConfig(port=0),
        "workers": loaded.workers if config else (WorkerConfig(role="both"),),
    }
    ready = loaded.model_copy(update=changed)
    plan = replace(
        EdgePlan(),
        concurrency=tuple(int(part) for part in concurrency.split(",")),
        requests=requests,
        abandons=abandons,
    )
    with (
        tempfile.TemporaryDirectory(prefix="kvmesh-bench-") as folder,
        progress_bar("bench", plan.rounds, hidden=json) as advance,
    ):
        found = await bench_edge(ready, plan, Path(folder), advance)
    machine = describe_machine()
    if json:
        about = {"benchmark": "edge", "machine": machine, "model": ready.model.name}
        print_json({**about, "plan": asdict(plan), **asdict(found)})
    else:
        console().print(f"{machine}; {ready.model.name}, codec {ready.model.codec}")
        _table(found.rows)
        if found.abandoned:
            _abandoned(found.abandoned)


def _table(rows: "list[EdgeRow]") -> None:
    print_table(
        "",
        (">in flight", ">pairs", ">TTFT p50: gRPC, HTTP", ">added, 95 % interval",
         ">token: gRPC, HTTP", ">added, 95 % interval"),
        [
            (
                row.concurrency,
                row.pairs,
                f"{row.grpc.ttft_p50_ms:.2f}, {row.http.ttft_p50_ms:.2f} ms",
                _added(row.added_ttft_ms, "ms", 2),
                _both(row.grpc.token_us, row.http.token_us),
                _added(row.added_token_percent, "%", 1),
            )
            for row in rows
        ],
    )  # fmt: skip
    print_table(
        "CPU of a token",
        (">in flight", ">mesh and client: gRPC, HTTP", ">added, 95 % interval",
         ">mesh alone: gRPC, HTTP", ">added, 95 % interval", ">edge alone", ">client alone"),
        [
            (
                row.concurrency,
                _both(row.grpc.all_us, row.http.all_us),
                _added(row.added_all_cpu_percent, "%", 1),
                _both(row.grpc.mesh_us, row.http.mesh_us),
                _added(row.added_mesh_cpu_percent, "%", 1),
                "" if row.edge_us is None else f"{row.edge_us:.0f} us",
                _both(row.grpc.client_us, row.http.client_us),
            )
            for row in rows
        ],
    )  # fmt: skip


def _abandoned(rows: "list[AbandonRow]") -> None:
    print_table(
        "from the client's close to all blocks being free",
        (">streams", ">tries", ">blocks held", ">median", ">largest"),
        [
            (r.streams, r.tries, f"{r.held_blocks:g}", f"{r.median_ms:.0f} ms",
             f"{r.largest_ms:.0f} ms")
            for r in rows
        ],
    )  # fmt: skip


def _both(grpc: float | None, http: float | None) -> str:
    return "" if grpc is None or http is None else f"{grpc:.0f}, {http:.0f} us"


def _added(found: "Estimate | None", unit: str, digits: int) -> str:
    if found is None:
        return ""
    low, high = (f"{value:+.{digits}f}" for value in (found.low, found.high))
    return f"{found.value:+.{digits}f} {unit} ({low} to {high})"
