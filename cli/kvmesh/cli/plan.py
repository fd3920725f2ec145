"""`kvmesh plan`: what a model and its traffic would take of devices, and how far to trust that."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.errors import FAILED
from kvmesh.cli.options import Json, command
from kvmesh.cli.plan_compare import budget, plan
from kvmesh.cli.plan_waterfall import waterfall
from kvmesh.cli.plan_workloads import workloads
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.validate import CalibrationRow

app = typer.Typer(help="Plan devices, time and cost; all of it simulated.")


@command
def validate(
    kernels: Annotated[bool, typer.Option(help="Show every kernel of C1 as well.")] = False,
    quick: Annotated[
        bool, typer.Option(help="Leave out the percentiles that take a minute to simulate.")
    ] = False,
    rows_file: Annotated[
        Path | None,
        typer.Option(
            "--rows",
            help="Instead, a file of published runs of your own; see docs/fidelity.md.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare predictions with published results; exit code 1 if one is beyond its tolerance."""
    from kvmesh.integration.validate import ROWS, SLOW_ROWS, calibration_rows, file_sources

    sources = ROWS if quick else ROWS + SLOW_ROWS
    if rows_file is not None:
        sources = file_sources(rows_file)
    with progress_bar("predicting", len(sources), hidden=json) as advance:
        rows = calibration_rows(sources, advance)
    beyond = [row for row in rows if not row.within]
    if json:
        print_json({"simulated": True, "ok": not beyond, "rows": [_plain(row) for row in rows]})
    else:
        shown = [row for row in rows if kernels or "." not in row.id]
        columns = (
            "row", "case", "unit", ">published", ">predicted", ">error", ">tolerance", "tag", "",
        )  # fmt: skip
        print_table("", columns, [_cells(row) for row in shown])
        hidden = len(rows) - len(shown)
        more = f"; {hidden} kernels not shown, --kernels shows them" if hidden else ""
        reasons = {f"{row.id} {row.case}": row.why or "no reason is known" for row in beyond}
        for case, why in reasons.items():
            console().print(f"\n{case}: {why}")
        console().print(f"\nsimulated; {len(beyond)} of {len(rows)} beyond tolerance{more}")
    if beyond:
        raise typer.Exit(FAILED)


def _plain(row: "CalibrationRow") -> dict[str, Any]:
    return {
        "id": row.id,
        "case": row.case,
        "unit": row.unit,
        "published": row.published,
        "predicted": row.predicted,
        "error": row.error,
        "tolerance": row.tolerance if row.tolerance != float("inf") else None,
        "within": row.within,
        "tag": row.tag,
        "source": row.source,
        "fitted": row.fitted,
        "held_out": not row.fitted,
        "why": row.why,
    }


def _cells(row: "CalibrationRow") -> tuple[str, ...]:
    limited = row.tolerance != float("inf")
    return (
        row.id,
        row.case,
        row.unit,
        f"{row.published:,.4g}",
        f"{row.predicted:,.4g}",
        f"{row.error:+.1%}",
        f"{row.tolerance:.1%}" if limited else "",
        row.tag,
        "beyond" if not row.within else "fitted" if row.fitted else "",
    )


app.callback(invoke_without_command=True)(plan)
app.command()(budget)
app.command()(waterfall)
app.command()(workloads)
app.command()(validate)
