"""`kvmesh bench serve`: a load as users would make it, and what became of it."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from kvmesh.cli.connect import resolve
from kvmesh.cli.errors import FAILED, USAGE, CommandFailed
from kvmesh.cli.load import Arrivals, Goals, Lengths, how_it_comes, limits_of, load_of
from kvmesh.cli.options import Json, Target, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, milliseconds, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.bench_serve import Driven, ServePlan
    from kvmesh.integration.serve_report import Report, Spread


Own = Annotated[
    bool, Option("--own", help="Start a mesh for this (with --config), use none that runs.")
]
Warm = Annotated[bool, Option("--warm", help="Prompts of earlier runs may be cached.")]


@command
async def serve(
    target: Target,
    arrivals: Arrivals,
    lengths: Lengths,
    goals: Goals,
    own: Own = False,
    warm: Warm = False,
    json: Json = False,
) -> None:
    """TTFT, TPOT, ITL, tokens/s, goodput and cost of a load over gRPC.

    Exit code 1 if a request failed.
    """
    from kvmesh.integration.bench_serve import ServePlan
    from kvmesh.integration.serve_report import report

    load = load_of(arrivals, lengths)
    closed = arrivals.rate is None and (arrivals.trace is None or arrivals.concurrency is not None)
    concurrency = (arrivals.concurrency or 8) if closed else None
    salt = "" if warm else secrets.token_hex(8)
    plan = ServePlan(load, concurrency, lengths.seed, salt)
    driven = await _drive(plan, target, own, hidden=json)
    result = report(driven.results, limits_of(goals))
    asked = {**asdict(arrivals), **asdict(lengths), **asdict(goals), "concurrency": concurrency}
    asked["trace"] = str(arrivals.trace) if arrivals.trace is not None else None
    if json:
        print_json(_record(asked, driven, result))
    else:
        _show(asked, driven, result)
    if result.errors:
        raise CommandFailed(
            f"{result.requests - result.finished} of {result.requests} requests failed, as "
            f"{next(r.error for r in driven.results if r.error)}",
            FAILED,
        )


async def _drive(plan: "ServePlan", target: Target, own: bool, hidden: bool) -> "Driven":
    import tempfile

    from kvmesh.integration.bench_serve import LoadError, drive, other_mesh, own_mesh
    from kvmesh.services.common.config import load_config

    try:
        if not own:
            with _progress(hidden) as bar:
                async with other_mesh(*resolve(target)) as client:
                    return await drive(client, plan, bar.begin, lambda _: bar.advance())
        config = load_config(target.config)
        config = config.model_copy(update={"router": config.router.model_copy(update={"port": 0})})
        with tempfile.TemporaryDirectory(prefix="kvmesh-bench-") as folder:
            async with own_mesh(config, Path(folder)) as client:
                with _progress(hidden) as bar:
                    return await drive(client, plan, bar.begin, lambda _: bar.advance())
    except LoadError as error:
        raise CommandFailed(str(error), USAGE) from error


class _Bar:
    """A progress bar whose length is known only once the load has been made."""

    def __init__(self, hidden: bool) -> None:
        from contextlib import ExitStack

        self._hidden = hidden
        self.stack = ExitStack()

    def begin(self, total: int) -> None:
        self.advance = self.stack.enter_context(progress_bar("requests", total, self._hidden))


@contextmanager
def _progress(hidden: bool) -> Iterator[_Bar]:
    bar = _Bar(hidden)
    with bar.stack:
        yield bar


def _record(asked: dict[str, Any], driven: "Driven", result: "Report") -> dict[str, Any]:
    from kvmesh.integration.machine import describe_machine

    return {
        "benchmark": "serve",
        "machine": describe_machine(),
        "model": driven.model.name,
        "codec": driven.model.format.codec,
        "clock": "simulated" if driven.simulated else "measured",
        "asked": asked,
        "too_long": driven.too_long,
        "report": asdict(result),
    }


def _show(asked: dict[str, Any], driven: "Driven", result: "Report") -> None:
    from kvmesh.integration.machine import describe_machine

    out = console()
    clock = ", simulated" if driven.simulated else ""
    out.print(
        f"{describe_machine()}; {driven.model.name}, codec {driven.model.format.codec}{clock}",
        markup=False,
    )
    out.print(f"{how_it_comes(asked)}; {result.requests} requests in {result.seconds:.1f} s\n")
    rows: list[tuple[str, Spread]] = [
        ("TTFT", result.ttft),
        ("TPOT", result.tpot),
        ("ITL", result.itl),
        ("request", result.duration),
    ]
    if asked["concurrency"] is None:
        rows.append(("sent late by", result.late))
    columns = ("", ">mean", ">p50", ">p90", ">p95", ">p99", ">max")
    print_table("", columns, [(name, *map(_ms, _cells(values))) for name, values in rows])
    out.print()
    for line in _sums(asked, driven, result):
        out.print(line, markup=False)


def _sums(asked: dict[str, Any], driven: "Driven", result: "Report") -> Iterator[str]:
    yield (
        f"output {result.output_tokens_per_s:.0f} tokens/s, with prompts "
        f"{result.total_tokens_per_s:.0f} tokens/s, {result.requests_per_s:.2f} requests/s"
    )
    names = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("gap", "itl_ms"), ("request", "latency_ms"))
    limits = [f"{n} <= {asked[key]:g} ms" for n, key in names if asked[key] is not None]
    if limits:
        yield (
            f"goodput {result.goodput_per_s:.2f} requests/s: {result.good} of {result.requests} "
            f"with {', '.join(limits)}"
        )
    share = result.cached_tokens / result.input_tokens if result.input_tokens else 0.0
    yield f"{result.cached_tokens} of {result.input_tokens} prompt tokens cached ({share:.0%})"
    device = f"{result.device_s:.2f} device seconds" if result.device_s is not None else ""
    price = result.usd_per_million_tokens
    dollars = f"${price:.4g} per million output tokens" if price is not None else ""
    yield "cost: " + (", ".join(part for part in (device, dollars) if part) or "not reported")
    if driven.too_long:
        yield f"{driven.too_long} requests left out: longer than the context"
    if result.migrations:
        yield f"{result.migrations} migrations"


def _cells(values: "Spread") -> tuple[float | None, ...]:
    return (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)


def _ms(seconds: float | None) -> str:
    return milliseconds(seconds) if seconds is not None else "-"
