"""`kvmesh model`: what a checkpoint can bear."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.errors import USAGE, CommandFailed
from kvmesh.cli.evaluate import Sample
from kvmesh.cli.options import Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.backends.models.codec_check import CodecCheck

app = typer.Typer(no_args_is_help=True, help="Examine checkpoints.")

Checkpoint = Annotated[
    Path, typer.Argument(help="A checkpoint folder, or the name of the bundled model.")
]


@command
def check(
    sample: Sample,
    path: Checkpoint = Path("mini"),
    budget: Annotated[float, typer.Option(help="Most KL against fp16, in nats.")] = 0.02,
    codecs: Annotated[
        str, typer.Option(help="That a layer may have, besides fp16.")
    ] = "k8v8,k4v4,k4v3,k3v3,k3v2,k2v2",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to write, else kvmesh-codec.json beside the checkpoint.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Find the cheapest codec of each layer that stays under a budget of KL, and write it down.

    Workers with codec "auto" use what is written.
    """
    import tempfile

    from kvmesh.backends.models.codec_check import CODEC_FILE, write_check
    from kvmesh.backends.models.config import read_config
    from kvmesh.integration.model_check import CheckPlan, check_model
    from kvmesh.integration.prompts import BUNDLED
    from kvmesh.kernels.layout import CODECS

    names = tuple(codecs.split(","))
    unknown = [name for name in names if name not in CODECS]
    if unknown or budget <= 0:
        wrong = f"codecs {', '.join(unknown)}: must be of {', '.join(CODECS)}" if unknown else ""
        raise CommandFailed(wrong or f"budget is {budget}, must be above 0 nats", USAGE)
    folder = _folder(path)
    target = output or folder / CODEC_FILE
    plan = CheckPlan(folder.name, sample.prompts.name if sample.prompts else BUNDLED, names, budget)
    layers = read_config(folder).num_layers
    with tempfile.TemporaryDirectory(prefix="kvmesh-check-") as scratch:
        bench = sample.bench(folder, scratch)
        total = bench.num_tokens * plan.num_measurements(layers)
        with progress_bar("check", total, hidden=json) as advance:
            found = check_model(bench, plan, layers, advance)
    write_check(target, found)
    if json:
        print_json(found.model_dump())
    else:
        _show(found, target)


def _folder(path: Path) -> Path:
    from kvmesh.services.common.checkpoint import checkpoint_path
    from kvmesh.services.common.config import ModelConfig

    if path.is_dir() or len(path.parts) > 1:
        return checkpoint_path(ModelConfig(name=path.name, path=path))
    return checkpoint_path(ModelConfig(name=path.name))


def _show(found: "CodecCheck", target: Path) -> None:
    out = console()
    codecs = list(found.layers)
    out.print(f"KL against fp16 in nats, one layer stored so, {found.positions} positions:")
    print_table(
        "",
        (">layer", *(f">{codec}" for codec in codecs), "chosen"),
        [
            (layer, *(f"{found.layers[codec][layer]:.1e}" for codec in codecs), chosen)
            for layer, chosen in enumerate(found.layer_codecs)
        ],
    )
    out.print("\nall layers:")
    rows = {**found.uniform, "chosen": found.chosen}
    print_table(
        "",
        ("codec", ">bytes/token", ">KL, nats", ">KL p99", ">same top token"),
        [
            (
                name,
                f"{loss.bytes_per_token:,}",
                f"{loss.kl_nats:.2e}",
                f"{loss.kl_p99_nats:.2e}",
                f"{loss.top1:.2%}",
            )
            for name, loss in rows.items()
        ],
    )
    out.print(f"\nunder the budget of {found.budget_nats:g} nats; written to {target}")


@command
def center(
    path: Checkpoint = Path("mini"),
    prompts: Annotated[
        Path | None, typer.Option(help="A file of texts (default: bundled)", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=65, help="To average over, in all.")] = 16_384,
    length: Annotated[int, typer.Option(min=65, help="Most tokens of one sequence.")] = 1024,
    json: Json = False,
) -> None:
    """Measure the mean keys and values, which the codec subtracts, and write them beside PATH.

    A checkpoint whose k_proj has a bias gets usable ones without this. Blocks of other means are of
    another model: caches start anew.
    """
    import numpy as np

    from kvmesh.backends.models.centers import write_centers
    from kvmesh.backends.models.loader import load_checkpoint
    from kvmesh.integration.capture import measure_centers
    from kvmesh.integration.prompts import load_sequences

    checkpoint = load_checkpoint(_folder(path))
    length = min(length, checkpoint.config.max_context)
    sequences = load_sequences(checkpoint.folder, prompts, tokens, length)
    with progress_bar("center", len(sequences), hidden=json) as advance:
        found = measure_centers(checkpoint, sequences, advance)
    target = write_centers(checkpoint.folder, found.mean)
    shares = [(float(k), float(v)) for k, v in np.asarray(found.share)]
    if json:
        parts = {"tokens": found.tokens, "shares": shares}
        print_json({"checkpoint": checkpoint.name, "file": str(target), **parts})
        return
    print_table(
        "share of the squared norm that lies in the mean",
        (">layer", ">keys", ">values"),
        [(layer, f"{k:.1%}", f"{v:.1%}") for layer, (k, v) in enumerate(shares)],
    )
    console().print(f"\nover {found.tokens:,} tokens; written to {target}")


app.command()(check)
app.command()(center)
