"""`kvmesh eval`: how often the model is right, through the whole mesh."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.options import Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmesh.integration.evaluate import NeedlePlan, NeedleScore
    from kvmesh.integration.loadgen import RequestResult
    from kvmesh.services.common.config import ModelConfig

app = typer.Typer(no_args_is_help=True, help="Measure answer quality.")

Codecs = Annotated[str, typer.Option(help="KV codecs to compare, comma-separated.")]
Lengths = Annotated[str, typer.Option(help="Document lengths in tokens, comma-separated.")]
Cases = Annotated[int, typer.Option(min=1, help="Questions for each length.")]
SeedOption = Annotated[int, typer.Option(min=0, max=(1 << 40) - 1, help="First document's seed.")]
ModelPath = Annotated[Path | None, typer.Option("--model", help="A checkpoint folder.")]


@command
async def needle(
    codecs: Codecs = "fp16,k4v4",
    lengths: Lengths = "256,512,1024",
    cases: Cases = 200,
    seed: SeedOption = 20_000,
    model: ModelPath = None,
    json: Json = False,
) -> None:
    """Exact answers to questions about fresh documents with 1 to 8 facts, for each codec."""
    from kvmesh.integration.evaluate import NeedlePlan

    plan = NeedlePlan(tuple(int(part) for part in lengths.split(",")), cases, seed)
    names = codecs.split(",")
    total = len(names) * len(plan.lengths) * plan.cases
    scores: list[NeedleScore] = []
    with progress_bar("needle", total, hidden=json) as advance:
        for codec in names:
            scores += await _score(_model(model, codec), plan, lambda _: advance())
    if json:
        print_json({"eval": "needle", "seed": seed, "scores": [s.as_json() for s in scores]})
        return
    print_table(
        "",
        ("codec", ">tokens", ">cases", ">exact", ">accuracy"),
        [(s.codec, s.length, s.cases, s.exact, f"{s.accuracy:.3f}") for s in scores],
    )


def _model(path: Path | None, codec: str) -> "ModelConfig":
    from kvmesh.services.common.config import parse_config

    table = {"codec": codec} | ({"path": str(path), "name": path.name} if path else {})
    return parse_config({"model": table}, "--codecs").model


async def _score(
    model: "ModelConfig", plan: "NeedlePlan", on_done: "Callable[[RequestResult], None]"
) -> "list[NeedleScore]":
    """Runs one mesh with this codec; two workers share the questions."""
    import tempfile

    from tokenizers import Tokenizer

    from kvmesh.integration.evaluate import needle_cases, score_needles
    from kvmesh.integration.launch import running_mesh
    from kvmesh.services.common.checkpoint import checkpoint_path
    from kvmesh.services.common.client import Link
    from kvmesh.services.common.config import MeshConfig, RouterConfig, WorkerConfig
    from kvmesh.services.router.client import InferenceClient

    tokenizer = Tokenizer.from_file(str(checkpoint_path(model) / "tokenizer.json"))
    workers = (WorkerConfig(role="both", count=2),)
    config = MeshConfig(model=model, workers=workers, router=RouterConfig(port=0))
    with tempfile.TemporaryDirectory(prefix="kvmesh-eval-") as folder:
        async with running_mesh(config, Path(folder)) as mesh:
            await mesh.wait_ready()
            async with Link(mesh.public_address, mesh.security) as link:
                client = InferenceClient(link)
                return [
                    await score_needles(
                        client,
                        model.codec,
                        needle_cases(plan, length, tokenizer),
                        plan.concurrency,
                        on_done,
                    )
                    for length in plan.lengths
                ]


app.command()(needle)


@app.callback()
def _group() -> None:
    """Keeps `needle` a command of the group while it is the only one."""
