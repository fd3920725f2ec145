"""How results of `kvmesh simulate` are shown; all of it says that it is simulated."""

from dataclasses import asdict, astuple
from typing import TYPE_CHECKING

from kvmesh.cli.errors import FAILED, CommandFailed
from kvmesh.cli.render import console, milliseconds, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmesh.integration.serve_report import Limits
    from kvmesh.integration.simulate import Result, Scenario
    from kvmesh.integration.simulate.result import PoolResult
    from kvmesh.integration.simulate.search import Found


def show_found(scenario: "Scenario", found: "Found", limits: "Limits", json: bool) -> None:
    """Raises CommandFailed (1) if no rate kept the limits."""
    from kvmesh.integration.simulate.report import result_record, scenario_record, verdict_record

    if json:
        trials = {"best": found.best, "over": found.over}
        record = {
            name: None
            if trial is None
            else {
                "qps": trial.qps,
                "verdict": verdict_record(trial.verdict),
                "result": result_record(trial.result, limits),
            }
            for name, trial in trials.items()
        }
        print_json(
            {
                "simulated": True,
                "scenario": scenario_record(scenario),
                "limits": asdict(limits),
                "max_qps": found.best.qps if found.best else 0.0,
                "binds": found.over.verdict.binding if found.over else "",
                "trials": found.trials,
                **record,
            }
        )
    elif found.best is not None:
        show_result(scenario, found.best.result, limits)
        console().print(f"\nat most {found.best.qps:.3g} requests/s (simulated)", markup=False)
    if not json and found.over is not None:
        told = f"at {found.over.qps:.3g} requests/s: {found.over.verdict.binding}"
        console().print(told, markup=False)
    if found.best is None:
        binds = found.over.verdict.binding if found.over else "nothing was tried"
        raise CommandFailed(f"no rate keeps the limits (simulated): {binds}", FAILED)


def show_result(scenario: "Scenario", result: "Result", limits: "Limits") -> None:
    from kvmesh.integration.simulate.verdict import judge

    out = console()
    pools = ", ".join(_pool_line(pool) for pool in result.pools)
    out.print(f"SIMULATED: {scenario.model.name} on {pools}", markup=False)
    out.print(f"{result.requests} requests in {result.seconds:,.1f} simulated s\n", markup=False)
    rows = (
        ("TTFT", result.ttft), ("TPOT", result.tpot), ("ITL", result.itl),
        ("request", result.duration),
    )  # fmt: skip
    columns = ("", ">mean", ">p50", ">p90", ">p95", ">p99", ">max")
    print_table("", columns, [(name, *map(_ms, astuple(spread))) for name, spread in rows])
    out.print()
    windows = (("legacy", result.legacy), ("native", result.native), ("steady", result.steady))
    print_table(
        "",
        ("output tokens", ">seconds", ">tokens/s", ">per device"),
        [
            (name, f"{w.seconds:,.1f}", f"{w.tokens_per_s:,.0f}", f"{w.tokens_per_s_device:,.1f}")
            for name, w in windows
        ],
    )
    out.print()
    for line in _sums(result, limits):
        out.print(line, markup=False)
    out.print(f"what binds: {judge(result, limits).binding}", markup=False)


def _pool_line(pool: "PoolResult") -> str:
    role = "" if pool.role == "both" else f" for {pool.role}"
    return f"{len(pool.workers)} workers{role} of {pool.devices // len(pool.workers)} {pool.device}"


def _sums(result: "Result", limits: "Limits") -> "Iterator[str]":
    yield (
        f"{result.prefix_hits:.1%} of prompt tokens cached, {result.migrations} migrations, "
        f"{result.too_long} left out as too long"
    )
    good = result.good(limits)
    if any(astuple(limits)):
        yield f"goodput {result.goodput_per_s(limits):.3g} requests/s: {good} of {result.requests}"
    for pool in result.pools:
        queue = pool.queue
        yield (
            f"{pool.role}: {pool.busy:.0%} busy, at most {max(queue.running)} running and "
            f"{max(queue.waiting)} waiting, KV at most {pool.peak_kv_share:.0%} full"
        )
    if result.errors:
        yield f"{result.requests - result.finished} failed: {result.first_error}"


def _ms(seconds: float | None) -> str:
    return milliseconds(seconds) if seconds is not None else "-"
