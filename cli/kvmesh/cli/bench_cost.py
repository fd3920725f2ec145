"""`kvmesh bench cost`: how fast the cost model answers."""

from dataclasses import asdict
from typing import Annotated

import typer

from kvmesh.cli.options import Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json, print_table


@command
def cost(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each; medians are shown.")] = 15,
    json: Json = False,
) -> None:
    """Steps per second that the cost model evaluates, for dense and MoE models."""
    from kvmesh.integration.bench_cost import CASES, bench_cost
    from kvmesh.integration.machine import describe_machine

    with progress_bar("bench", CASES * rounds, hidden=json) as advance:
        rows = bench_cost(rounds, advance)
    machine = describe_machine()
    if json:
        print_json({"benchmark": "cost", "machine": machine, "rows": [asdict(row) for row in rows]})
        return
    console().print(machine)
    cells = [(r.case, f"{r.steps_per_s:,.0f}", f"{r.breakdowns_per_s:,.0f}") for r in rows]
    print_table("", ("model", ">steps/s", ">with breakdown/s"), cells)
