"""`kvmesh eval`: how often the model is right through the whole mesh, and what a codec changes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.errors import USAGE, CommandFailed
from kvmesh.cli.options import Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import print_json, print_markdown, print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tokenizers import Tokenizer

    from kvmesh.integration.evaluate import EvalCase, Score
    from kvmesh.integration.kl import KlBench
    from kvmesh.integration.paired import Difference
    from kvmesh.services.common.config import ModelConfig

app = typer.Typer(no_args_is_help=True, help="Measure answer quality, and what a codec changes.")

SeedOption = Annotated[int, typer.Option(min=0, max=(1 << 40) - 1, help="First document's seed.")]
Lengths = Annotated[str, typer.Option(help="Document lengths in tokens, comma-separated.")]
Plots = Annotated[
    Path | None,
    typer.Option("--plots", help="Write plots, SVG and PNG, into this folder.", file_okay=False),
]


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how it is told."""

    codecs: Annotated[str, typer.Option(help="KV codecs to compare, comma-separated.")] = (
        "fp16,k4v4,k3v3,k2v2"
    )
    model: Annotated[
        Path | None,
        typer.Option("--model", help="A checkpoint folder, else mini.", show_default=False),
    ] = None
    json: Json = False
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table for a document.")
    ] = False

    def models(self) -> "dict[str, ModelConfig]":
        """By codec. Raises ConfigError for an unknown one."""
        from kvmesh.services.common.config import parse_config

        where = {"path": self.model, "name": self.model.name} if self.model else {}
        return {
            codec: parse_config({"model": {"codec": codec, **where}}, "--codecs").model
            for codec in self.codecs.split(",")
        }

    @property
    def folder(self) -> Path:
        from kvmesh.services.common.checkpoint import checkpoint_path

        return checkpoint_path(next(iter(self.models().values())))

    def tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def count(self) -> "Callable[[str], int]":
        """Tokens of a text."""
        tokenizer = self.tokenizer()
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)

    def show(self, columns: "Sequence[str]", rows: "Sequence[Sequence[Any]]") -> None:
        if self.markdown:
            print_markdown(columns, rows)
        else:
            print_table("", columns, rows)


@dataclass(frozen=True)
class Sample:
    """The tokens that KL is measured on, and what runs the model."""

    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of texts, else the bundled ones.", show_default=False),
    ] = None
    tokens: Annotated[int, typer.Option(min=65, help="To compare on, in all.")] = 4096
    length: Annotated[int, typer.Option(min=65, help="Most tokens of one sequence.")] = 512
    backend: Annotated[
        str, typer.Option(help="Which backend runs the model; see 'kvmesh doctor'.")
    ] = "auto"

    def bench(self, folder: Path, scratch: str) -> "KlBench":
        """Raises ConfigError for a file that is none, or a checkpoint without a tokenizer."""
        from kvmesh.integration.kl import KlBench
        from kvmesh.integration.prompts import load_sequences

        sequences = load_sequences(folder, self.prompts, self.tokens, self.length)
        return KlBench(self.backend, folder, sequences, Path(scratch))


@command
async def needle(
    subject: Subject,
    lengths: Lengths = "256,512,1024",
    depths: Annotated[str, typer.Option(help="Where the fact lies, 0..1.")] = "0,0.25,0.5,0.75,1",
    cases: Annotated[int, typer.Option(min=1, help="Questions for each length.")] = 200,
    seed: SeedOption = 20_000,
    plots: Plots = None,
) -> None:
    """Exact answers to questions about fresh documents, over their length and the fact's depth."""
    from kvmesh.integration.eval_plots import needle_plot
    from kvmesh.integration.evaluate import NeedlePlan, differences, merged, needle_cases

    plan = NeedlePlan(_ints(lengths), _floats(depths), cases, seed)
    scores = await _scores("needle", subject, _checked(needle_cases, plan, subject.count()))
    if plots is not None:
        _write(plots, {f"needle-{c}": needle_plot(c, scores) for c in subject.models()})
    found = differences(scores)
    if subject.json:
        told = {codec: {**asdict(one), "mean": one.mean} for codec, one in found.items()}
        _print_scores("needle", scores, seed=seed, differences=told)
    else:
        _show_by_codec(subject, ">tokens", merged(scores, 0))
        _show_differences(subject, scores[0].codec, found)


@command
async def ruler(
    subject: Subject,
    tasks: Annotated[str, typer.Option(help="Comma-separated; none takes all.")] = "",
    lengths: Lengths = "1024,2048",
    cases: Annotated[int, typer.Option(min=1, help="Questions per task and length.")] = 25,
    seed: SeedOption = 30_000,
) -> None:
    """Generated long-context questions of the seven kinds that RULER asks."""
    from kvmesh.integration.ruler import RulerPlan, ruler_cases

    plan = RulerPlan(tuple(tasks.split(",")) if tasks else (), _ints(lengths), cases, seed)
    scores = await _scores("ruler", subject, _checked(ruler_cases, plan, subject.count()))
    if subject.json:
        _print_scores("ruler", scores, seed=seed)
    else:
        _show_by_codec(subject, "task, tokens", scores)


@command
async def longbench(
    subject: Subject,
    folder: Annotated[Path, typer.Argument(help="Holds LongBench's public .jsonl files.")],
    datasets: Annotated[str, typer.Option(help="Comma-separated; none takes all.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each data set.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=64, help="Of a prompt; longer ones lose their middle.")
    ] = None,
) -> None:
    """LongBench's questions and metrics, on its public files."""
    from kvmesh.backends.models.config import read_config
    from kvmesh.integration.longbench import LongBenchPlan, longbench_cases

    most = max_tokens or read_config(subject.folder).max_context - 64  # the template's tokens
    plan = LongBenchPlan(folder, most, tuple(datasets.split(",")) if datasets else (), limit)
    scores = await _scores("longbench", subject, longbench_cases(plan, subject.tokenizer()))
    if subject.json:
        _print_scores("longbench", scores)
    else:
        _show_by_codec(subject, "data set", scores)


@command
def kl(
    subject: Subject,
    sample: Sample,
    plots: Plots = None,
) -> None:
    """KL and top-1 agreement of each codec with fp16, token by token on the decode path."""
    import tempfile

    from kvmesh.integration.eval_plots import kl_bytes_plot, kl_position_plot
    from kvmesh.integration.kl import Stored

    codecs = list(subject.models())
    with tempfile.TemporaryDirectory(prefix="kvmesh-kl-") as scratch:
        bench = sample.bench(subject.folder, scratch)
        total = bench.num_tokens * (len(codecs) + 1)
        with progress_bar("kl", total, hidden=subject.json) as advance:
            found = {codec: bench.measure(Stored(codec), advance) for codec in codecs}
        positions = bench.num_positions
    losses = {codec: one.loss() for codec, one in found.items()}
    name = subject.folder.name
    if plots is not None:
        _write(
            plots,
            {
                "kl-position": kl_position_plot(name, found),
                "kl-bytes": kl_bytes_plot(name, losses),
            },
        )
    if subject.json:
        rows = [
            {
                "codec": codec,
                **loss.model_dump(),
                "by_position": found[codec].by_block(),
                "by_sequence": found[codec].by_sequence(),
            }
            for codec, loss in losses.items()
        ]
        print_json({"eval": "kl", "model": name, "positions": positions, "rows": rows})
    else:
        _show_losses(subject, losses)


def _show_losses(subject: Subject, losses: "Mapping[str, Any]") -> None:
    subject.show(
        ("codec", ">bytes/token", ">KL, nats", ">KL p99", ">same top token"),
        [
            (
                codec,
                f"{loss.bytes_per_token:,}",
                f"{loss.kl_nats:.2e}",
                f"{loss.kl_p99_nats:.2e}",
                f"{loss.top1:.2%}",
            )
            for codec, loss in losses.items()
        ],
    )


async def _scores(title: str, subject: Subject, cases: "list[EvalCase]") -> "list[Score]":
    from kvmesh.integration.evaluate import evaluate, score_all

    models = subject.models()
    scores: list[Score] = []
    with progress_bar(title, len(models) * len(cases), hidden=subject.json) as advance:
        for codec, model in models.items():
            results = await evaluate(model, cases, lambda _: advance())
            scores += score_all(codec, cases, results)
    return scores


def _show_by_codec(subject: Subject, first: str, scores: "Sequence[Score]") -> None:
    """One row per group, one column per codec; failures are told below."""
    codecs = list(dict.fromkeys(score.codec for score in scores))
    rows: dict[tuple[str, ...], dict[str, Score]] = {}
    for score in scores:
        rows.setdefault(score.group, {})[score.codec] = score
    subject.show(
        (first, ">cases", *(f">{codec}" for codec in codecs)),
        [
            (", ".join(group), row[codecs[0]].cases, *(f"{row[c].mean:.1%}" for c in codecs))
            for group, row in rows.items()
        ],
    )
    failed = sum(score.errors for score in scores)
    if failed:
        typer.echo(f"{failed} requests failed and count as 0", err=True)


def _show_differences(subject: Subject, first: str, found: "Mapping[str, Difference]") -> None:
    """Whether codecs differ from the first by more than chance."""
    if not found:
        return
    typer.echo()
    subject.show(
        (f"beside {first}", ">lost", ">won", ">points", ">95 % interval"),
        [
            (
                codec,
                one.lost,
                one.won,
                f"{one.mean * 100:+.2f}",
                f"{one.low * 100:+.2f} to {one.high * 100:+.2f}",
            )
            for codec, one in found.items()
        ],
    )


def _print_scores(name: str, scores: "Sequence[Score]", **more: Any) -> None:
    print_json({"eval": name, **more, "scores": [score.as_json() for score in scores]})


def _write(folder: Path, plots: "Mapping[str, str]") -> None:
    """plots: SVG by name; each is drawn as PNG too."""
    from kvmesh.integration.plot_png import draws_text, png

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in plots.items():
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
        (folder / f"{name}.png").write_bytes(png(text))
    if not draws_text():
        typer.echo("no font is installed: the PNG plots lack their text, the SVG have it", err=True)


def _checked(make: "Callable[..., list[EvalCase]]", *arguments: Any) -> "list[EvalCase]":
    """A plan out of range is a mistake of usage."""
    try:
        return make(*arguments)
    except ValueError as error:
        raise CommandFailed(str(error), USAGE) from error


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(value) for value in _floats(text))


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise CommandFailed(f"{text!r} must be numbers, comma-separated", USAGE) from error


for each in (needle, ruler, longbench, kl):
    app.command()(each)
