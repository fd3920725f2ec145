"""`kvmesh bench mlperf`: MLPerf's own LoadGen in front of a live mesh."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.connect import resolve
from kvmesh.cli.errors import FAILED, USAGE, CommandFailed
from kvmesh.cli.options import Json, Target, command
from kvmesh.cli.progress import Advance, progress_bar
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.mlperf.run import MlperfPlan, MlperfRun
    from kvmesh.services.router.client import InferenceClient


@command
async def mlperf(
    target: Target,
    scenario: Annotated[str, typer.Option(help="offline, server or interactive.")] = "server",
    workload: Annotated[
        str, typer.Option(help="Whose lengths and limits count (see kvmesh plan).")
    ] = "mlperf-llama-3.1-8b",
    qps: Annotated[float, typer.Option(min=0.001, help="Requests/s of server, interactive.")] = 1.0,
    min_seconds: Annotated[
        float, typer.Option(min=1, help="LoadGen goes on for so long (MLPerf: 600).")
    ] = 30.0,
    samples: Annotated[int, typer.Option(min=1, help="In the library (of offline: all).")] = 64,
    scale: Annotated[float, typer.Option(min=0.001, help="Lengths times this.")] = 1.0,
    own: Annotated[bool, typer.Option("--own", help="Start a mesh for this.")] = False,
    logs: Annotated[
        Path | None, typer.Option(help="Keep LoadGen's logs here.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Run a scenario of MLPerf; exit code 1 if LoadGen calls the result invalid.

    Not a submission: no accuracy run, and by default a shorter one than the rules ask for.
    """
    import tempfile

    from kvmesh.integration.mlperf.run import SCENARIOS, MlperfPlan, load_loadgen, run_mlperf
    from kvmesh.integration.planning.traffic import load_workload

    if scenario not in SCENARIOS:
        raise CommandFailed(
            f"--scenario is {scenario!r}, must be one of {', '.join(SCENARIOS)}", USAGE
        )
    load_loadgen()
    plan = MlperfPlan(load_workload(f"{workload}:{scenario}"), qps, min_seconds, samples, scale)
    bar = _Bar(hidden=json)
    with tempfile.TemporaryDirectory(prefix="kvmesh-mlperf-") as folder:
        kept = logs or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        async with _client(target, own, Path(folder)) as client:
            with bar.stack:
                found = await run_mlperf(client, plan, kept, bar.begin, lambda: bar.advance())
    if json:
        print_json(_record(plan, workload, found))
    else:
        _show(plan, workload, found)
    if not found.valid:
        raise CommandFailed(_why(found), FAILED)


@asynccontextmanager
async def _client(target: Target, own: bool, folder: Path) -> "AsyncIterator[InferenceClient]":
    from kvmesh.integration.bench_serve import other_mesh, own_mesh
    from kvmesh.services.common.config import load_config

    if not own:
        async with other_mesh(*resolve(target)) as client:
            yield client
        return
    config = load_config(target.config)
    config = config.model_copy(update={"router": config.router.model_copy(update={"port": 0})})
    async with own_mesh(config, folder / "mesh") as client:
        yield client


class _Bar:
    """A progress bar whose length is known only once the mesh is there."""

    def __init__(self, hidden: bool) -> None:
        from contextlib import ExitStack

        self._hidden = hidden
        self.stack = ExitStack()
        self.advance: Advance = lambda steps=1: None

    def begin(self, total: int) -> None:
        self.advance = self.stack.enter_context(progress_bar("queries", total, self._hidden))


def _record(plan: "MlperfPlan", workload: str, found: "MlperfRun") -> dict[str, Any]:
    from kvmesh.integration.machine import describe_machine

    asked = {name: getattr(plan, name) for name in ("qps", "min_seconds", "samples", "scale")}
    return {
        "benchmark": "mlperf",
        "machine": describe_machine(),
        "clock": "simulated" if found.simulated else "measured",
        "workload": workload,
        "asked": asked,
        "limits": plan.workload.scenario.model_dump(),
        "valid": found.valid,
        **asdict(found),
    }


def _show(plan: "MlperfPlan", workload: str, found: "MlperfRun") -> None:
    from kvmesh.integration.machine import describe_machine

    out, values = console(), found.loadgen
    clock = ", simulated" if found.simulated else ""
    out.print(f"{describe_machine()}; {found.model}{clock}", markup=False)
    out.print(f"{workload}, {found.scenario}, lengths x {plan.scale:g}: {found.issued} queries\n")
    limits = plan.workload.scenario
    rows = [
        ("tokens/s", f"{values.get('tokens_per_s', 0):,.1f}", ""),
        ("queries/s", f"{values.get('samples_per_s', 0):,.2f}", ""),
        ("TTFT p99", _ms(values.get("ttft_p99_ns")), _limit(limits.ttft_ms)),
        ("TPOT p99", _ms(values.get("tpot_p99_ns")), _limit(limits.tpot_ms)),
        ("result", str(values.get("validity")), ""),
    ]
    print_table("", ("LoadGen", ">value", ">limit"), rows)


def _why(found: "MlperfRun") -> str:
    if found.failed:
        return f"{len(found.failed)} of {found.issued} queries failed, as {found.failed[0]}"
    names = ("limits_met", "min_duration_met", "early_stopping_met")
    missed = [name for name in names if found.loadgen.get(name) is False]
    return f"LoadGen calls the run invalid: not {', not '.join(missed) or 'enough queries'}"


def _ms(nanoseconds: float | None) -> str:
    return "-" if nanoseconds is None else f"{nanoseconds / 1e6:,.1f} ms"


def _limit(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:,.0f} ms"
