"""`kvmesh bench codec`: what each way to store keys and values costs and loses."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.options import Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.bench_codec import CodecRow, Sample
    from kvmesh.integration.bench_paper import PaperRow

_LOSSES = ("mse", "ip_bias", "ip_variance", "softmax_kl", "attention_error")
_CAPTURED_TOKENS = 1024
_CAPTURED_SEED = 39_999  # of a document that no calibration sees

ModelPath = Annotated[
    Path | None, typer.Option("--model", help="Capture from this checkpoint folder, not mini.")
]
Plot = Annotated[
    Path | None,
    typer.Option(help="Write the captured sample's loss against memory to this SVG file."),
]


@command
def codec(model: ModelPath = None, plot: Plot = None, json: Json = False) -> None:
    """Bits with all side information, and what is lost, for ours and for others.

    On Gaussian keys, on keys with offset channels, and on keys and values captured from a model.
    Then the TurboQuant paper's own figures, measured again.
    """
    from kvmesh.integration.bench_codec import bench_codec, methods, synthetic
    from kvmesh.integration.bench_paper import BITS, paper_rows
    from kvmesh.integration.codec_plot import codec_plot

    total = 3 * len(methods()) + 2 * len(BITS)
    with progress_bar("bench", total, hidden=json) as advance:
        samples = [*synthetic(), _captured(model)]
        rows = list(bench_codec(samples, advance))
        paper = list(paper_rows(on_row=advance))
    if plot:
        plot.write_text(codec_plot(rows, samples[-1].name))
    if json:
        parts = {"rows": [asdict(row) for row in rows], "paper": [asdict(row) for row in paper]}
        print_json({"benchmark": "codec", **parts})
        return
    _print_losses(rows)
    console().print()
    _print_paper(paper)


def _captured(model: Path | None) -> "Sample":
    from kvmesh.backends.models.loader import load_checkpoint
    from kvmesh.integration.bench_codec import captured
    from kvmesh.integration.capture import capture
    from kvmesh.integration.prompts import PromptSet
    from kvmesh.services.common.checkpoint import checkpoint_path
    from kvmesh.services.common.config import ModelConfig

    checkpoint = load_checkpoint(checkpoint_path(ModelConfig(path=model)))
    tokens = min(_CAPTURED_TOKENS, checkpoint.config.max_context)
    ids = PromptSet(checkpoint.folder).document(_CAPTURED_SEED, tokens)
    return captured(capture(checkpoint, ids), f"captured from {checkpoint.name}")


def _print_losses(rows: "list[CodecRow]") -> None:
    columns = (
        "sample", "method", ">bits", ">mse", ">ip bias", ">ip variance", ">softmax KL",
        ">attention error", "ours at no more bits", ">its KL is smaller",
    )  # fmt: skip
    print_table(
        "",
        columns,
        [
            (
                row.sample,
                row.method,
                f"{row.bits_per_element:.3f}",
                *(f"{getattr(row.losses, name):.3g}" for name in _LOSSES),
                row.ours,
                f"{row.kl_to_ours:.2f}x" if row.ours else "",
            )
            for row in rows
        ],
    )


def _print_paper(rows: "list[PaperRow]") -> None:
    print_table(
        "TurboQuant (arXiv 2504.19874) as published, measured again",
        ("quantity", ">bits", ">printed", ">by its formula", ">measured", ">off"),
        [
            (
                row.quantity,
                row.bits,
                f"{row.printed:g}",
                f"{row.exact:.4f}",
                f"{row.measured:.4f}",
                f"{row.error:+.2%}",
            )
            for row in rows
        ],
    )
