"""`kvmesh plan workloads`: what traffic there is to plan for, and the file behind it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.options import Json, command
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.planning.traffic import Workload


@command
def workloads(
    name: Annotated[
        str | None,
        typer.Argument(help="Prints this workload's file, to copy.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """List the workloads, or print one's file to copy and change."""
    from kvmesh.integration.planning.traffic import load_workload, workload_names, workload_text

    if name is not None:
        found = load_workload(name)
        if json:
            print_json(found.model_dump(mode="json"))
        else:
            typer.echo(workload_text(name), nl=False)
        return
    every = [load_workload(each) for each in workload_names()]
    if json:
        print_json([_plain(workload) for workload in every])
        return
    columns = ("workload", "title", "scenarios", ">mean in", ">mean out", ">cached")
    print_table("", columns, [_row(_plain(workload)) for workload in every])
    console().print(
        "\nkvmesh plan workloads NAME prints a file to copy; its path is then a name too"
    )


def _plain(workload: "Workload") -> dict[str, Any]:
    from kvmesh.integration.planning.requests import mix

    traffic = mix(workload)
    return {
        "name": workload.name,
        "title": workload.title,
        "source": workload.source,
        "model": workload.model,
        "scenarios": list(workload.scenarios),
        "mean_input_tokens": traffic.inputs.mean,
        "mean_output_tokens": traffic.outputs.mean,
        "cached_share": traffic.cached,
    }


def _row(plain: dict[str, Any]) -> tuple[str, ...]:
    return (
        plain["name"],
        plain["title"],
        ", ".join(plain["scenarios"]),
        f"{plain['mean_input_tokens']:,.0f}",
        f"{plain['mean_output_tokens']:,.0f}",
        f"{plain['cached_share']:.0%}",
    )
