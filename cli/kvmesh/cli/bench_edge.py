"""`kvmesh bench edge`: what the HTTP edge adds beside direct gRPC."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.options import ConfigFile, Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.bench_edge import EdgeRow
    from kvmesh.integration.estimate import Estimate

Concurrency = Annotated[str, typer.Option(help="Requests in flight, comma-separated.")]
Requests = Annotated[
    int, typer.Option(min=1, help="Requests over each side, in pairs of as many as are in flight.")
]


@command
async def edge(
    config: ConfigFile = None,
    concurrency: Concurrency = "1,4,16",
    requests: Requests = 256,
    json: Json = False,
) -> None:
    """TTFT and cost of a token over HTTP, beside direct gRPC, in one run on one mesh.

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
    )
    with (
        tempfile.TemporaryDirectory(prefix="kvmesh-bench-") as folder,
        progress_bar("bench", sum(map(plan.pairs, plan.concurrency)), hidden=json) as advance,
    ):
        rows = await bench_edge(ready, plan, Path(folder), advance)
    machine = describe_machine()
    if json:
        found = {"plan": asdict(plan), "rows": [asdict(row) for row in rows]}
        print_json({"benchmark": "edge", "machine": machine, "model": ready.model.name, **found})
    else:
        console().print(f"{machine}; {ready.model.name}, codec {ready.model.codec}")
        _table(rows)


def _table(rows: "list[EdgeRow]") -> None:
    columns = (
        ">in flight", ">pairs", ">TTFT p50: gRPC, HTTP", ">added, 95 % interval",
        ">token: gRPC, HTTP", ">added, 95 % interval", ">mesh's CPU: gRPC, HTTP",
        ">added, 95 % interval", ">edge's CPU", ">clients' CPU",
    )  # fmt: skip
    print_table(
        "",
        columns,
        [
            (
                row.concurrency,
                row.pairs,
                f"{row.grpc.ttft_p50_ms:.2f}, {row.http.ttft_p50_ms:.2f} ms",
                _added(row.added_ttft_ms, "ms", 2),
                f"{row.grpc.token_us:.0f}, {row.http.token_us:.0f} us",
                _added(row.added_token_percent, "%", 1),
                "" if row.edge_us is None else f"{row.grpc.mesh_us:.0f}, {row.http.mesh_us:.0f} us",
                _added(row.added_cpu_percent, "%", 1),
                "" if row.edge_us is None else f"{row.edge_us:.0f} us",
                f"{row.grpc.client_us:.0f}, {row.http.client_us:.0f} us",
            )
            for row in rows
        ],
    )


def _added(found: "Estimate | None", unit: str, digits: int) -> str:
    if found is None:
        return ""
    low, high = (f"{value:+.{digits}f}" for value in (found.low, found.high))
    return f"{found.value:+.{digits}f} {unit} ({low} to {high})"
