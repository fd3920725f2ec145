"""`kvmesh plan`: what a model and its traffic would take of devices, and how far to trust that."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.errors import FAILED
from kvmesh.cli.options import Json, command
from kvmesh.cli.plan_compare import budget, plan
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.validate import CalibrationRow

app = typer.Typer(help="Plan devices, time and cost; all of it simulated.")


@command
def validate(
    kernels: Annotated[bool, typer.Option(help="Show every kernel of C1 as well.")] = False,
    json: Json = False,
) -> None:
    """Compare predictions with published results; exit code 1 if one is beyond its tolerance."""
    from kvmesh.integration.validate import calibration_rows

    rows = calibration_rows()
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
        for row in beyond:
            console().print(f"\n{row.id} {row.case}: {row.why or 'no reason is known'}")
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
app.command()(validate)
