"""`kvmesh bench`: what the mesh costs, measured here and now."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.bench_codec import codec
from kvmesh.cli.bench_cost import cost
from kvmesh.cli.bench_edge import edge
from kvmesh.cli.bench_kernels import kernels
from kvmesh.cli.bench_mlperf import mlperf
from kvmesh.cli.bench_serve import serve
from kvmesh.cli.bench_simulate import simulate
from kvmesh.cli.bench_spans import spans
from kvmesh.cli.options import ConfigFile, Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, milliseconds, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.bench_mesh import BenchRow
    from kvmesh.services.common.config import MeshConfig

app = typer.Typer(no_args_is_help=True, help="Measure the mesh and its codec, or put load on one.")

Concurrency = Annotated[str, typer.Option(help="Requests in flight, comma-separated.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Length of each prompt.")]
OutputTokens = Annotated[int, typer.Option(min=1, help="Length of each output.")]
KvCodec = Annotated[
    str | None, typer.Option("--codec", help="In place of the configured one.", show_default=False)
]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds of each; medians are shown.")]


@app.callback()
def _lightest_client() -> None:
    """The client shares the cores with what it measures."""
    from kvmesh.services.common.poller import choose_poller

    choose_poller()


@dataclass(frozen=True)
class Requests:
    """What is sent, and how often."""

    concurrency: Concurrency = "1,4,16,64"
    prompt_tokens: PromptTokens = 128
    output_tokens: OutputTokens = 64
    rounds: Rounds = 3


@command
async def mesh(
    requests: Requests,
    config: ConfigFile = None,
    kv_codec: KvCodec = None,
    json: Json = False,
) -> None:
    """Tokens/s and TTFT through a whole mesh, beside the bare engine, in one run.

    Without --config the mesh has one worker that does both phases, as the bare engine does.
    """
    import tempfile

    from kvmesh.integration.bench_mesh import BenchPlan, bench_mesh
    from kvmesh.integration.machine import describe_machine
    from kvmesh.services.common.codec_choice import choose_codec, find_check

    ready = _measured_mesh(config, kv_codec)
    in_flight = tuple(int(part) for part in requests.concurrency.split(","))
    plan = replace(BenchPlan(), **asdict(requests) | {"concurrency": in_flight})
    total = len(plan.concurrency) * plan.rounds
    with (
        tempfile.TemporaryDirectory(prefix="kvmesh-bench-") as folder,
        progress_bar("bench", total, hidden=json) as advance,
    ):
        rows = await bench_mesh(ready, plan, Path(folder), advance)
    machine = describe_machine()
    if json:
        parts = {"plan": asdict(plan), "rows": [asdict(row) for row in rows]}
        print_json({"benchmark": "mesh", "machine": machine, "model": ready.model.name, **parts})
    else:
        choice = choose_codec(ready.model, find_check(ready.model))
        console().print(f"{machine}; {ready.model.name}, codec {choice.label}")
        _table(rows)


def _measured_mesh(config: Path | None, kv_codec: str | None) -> "MeshConfig":
    """The configured mesh without an edge, on a free port; one worker if none is configured."""
    from kvmesh.services.common.config import GatewayConfig, WorkerConfig, load_config, parse_config

    loaded = load_config(config)
    if kv_codec is not None:
        model = loaded.model.model_dump() | {"codec": kv_codec, "layer_codecs": ()}
        chosen = parse_config({"model": model}, "--codec").model
        loaded = loaded.model_copy(update={"model": chosen})
    workers = loaded.workers if config else (WorkerConfig(role="both"),)
    router = loaded.router.model_copy(update={"port": 0})
    changed = {"workers": workers, "router": router, "gateway": GatewayConfig(enabled=False)}
    return loaded.model_copy(update=changed)


def _table(rows: "list[BenchRow]") -> None:
    columns = (
        ">in flight", ">mesh tok/s", ">bare tok/s", ">ratio", ">overhead/token",
        ">mesh TTFT p50", ">p99", ">bare TTFT p50", ">p99",
    )  # fmt: skip
    print_table(
        "",
        columns,
        [
            (
                row.concurrency,
                f"{row.mesh.tokens_per_s:.0f}",
                f"{row.bare.tokens_per_s:.0f}",
                f"{row.ratio:.2f}",
                f"{row.overhead_us:.0f} us",
                milliseconds(row.mesh.ttft_p50_s),
                milliseconds(row.mesh.ttft_p99_s),
                milliseconds(row.bare.ttft_p50_s),
                milliseconds(row.bare.ttft_p99_s),
            )
            for row in rows
        ],
    )


app.command()(mesh)
app.command()(codec)
app.command()(kernels)
app.command()(serve)
app.command()(mlperf)
app.command()(cost)
app.command()(edge)
app.command()(simulate)
app.command()(spans)
