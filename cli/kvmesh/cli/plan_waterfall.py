"""`kvmesh plan waterfall`: what each optimisation and then the hardware does, simulated."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.devices import Folder
from kvmesh.cli.options import Json, command
from kvmesh.cli.plan_compare import Plot, What, plain_question, question_of
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.planning.claims import Axis, Claim
    from kvmesh.integration.planning.compare import Question
    from kvmesh.integration.planning.shapley import Contribution
    from kvmesh.integration.planning.waterfall import Measured, Waterfall


@dataclass(frozen=True)
class Effort:
    """How much is simulated."""

    orders: Annotated[
        int, typer.Option(help="Orders in which optimisations are switched on; 0: all of them.")
    ] = 12
    requests: Annotated[int, typer.Option(help="Requests of each simulation.")] = 450
    seed: Annotated[int, typer.Option(help="Of requests and orders.")] = 1


@command
def waterfall(
    what: What,
    effort: Effort,
    device: Annotated[str, typer.Option(help="The device to begin with.")] = "gb300",
    to: Annotated[
        str | None, typer.Option(help="The device of the last step; none: no such step.")
    ] = "rubin",
    optimisation: Annotated[
        list[str] | None,
        typer.Option(
            help="One to switch: kv, fused, balance, disagg, wide-ep, mtp, routing (default: all).",
            show_default=False,
        ),
    ] = None,
    kv: Annotated[str, typer.Option(help="What KV compression compresses to, from fp16.")] = "k4v4",
    folder: Folder = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Switch optimisations in the simulator, in many orders, and say what each contributes.

    The worth of a set is the output tokens/s per device at the highest load that keeps the limits
    for 95 % of requests; published claims are shown beside, and never multiplied in.
    """
    from kvmesh.backends.cost.price import price_of
    from kvmesh.backends.devices import load_device
    from kvmesh.integration.planning import waterfall as planning
    from kvmesh.integration.planning.choice import read_choice
    from kvmesh.integration.planning.claims import hardware_axis

    question = question_of(what)
    first = load_device(device, folder)
    second = load_device(to, folder) if to and to != "none" else None
    prices = (price_of(first), price_of(second or first))
    bench = planning.bench_of(question, first, kv, (effort.requests, effort.seed))
    orders, skipped = planning.plan_orders(bench, optimisation, effort.orders)
    total = planning.sets_to_measure(orders, second is not None)
    with progress_bar("simulating sets of optimisations", total, hidden=json) as advance:
        bench.done = advance
        found = planning.waterfall(bench, orders, (first, second), prices)
    title = f"{question.model.name}, {question.workload.title} (simulated)"
    if plot is not None:
        from kvmesh.integration.planning.waterfall_plot import waterfall_plot

        plot.write_text(waterfall_plot(found, title), encoding="utf-8")
    names = [each for each in (device, to) if second is not None and each]
    axes = hardware_axis(question, *(read_choice(n, folder) for n in names)) if names else []
    if json:
        told = {**plain_question(question), "orders": len(orders), "skipped": skipped}
        print_json({**told, **_plain(found, axes)})
        return
    _show(question, found, skipped, len(orders))
    _show_axes(found, axes)
    if plot is not None:
        console().print(f"plot: {plot}")


def _plain(found: "Waterfall", axes: "list[Axis]") -> dict[str, Any]:
    from kvmesh.integration.planning.claims import CLAIMS

    before, full, final = found.dollars
    return {
        "steps": [asdict(step) for step in found.steps],
        "hardware": asdict(found.hardware) if found.hardware else None,
        "software_factor": found.software,
        "total_factor": found.total,
        "product_of_best_cases": found.best_cases,
        "base": _plain_measured(found.base),
        "full": _plain_measured(found.full),
        "final": _plain_measured(found.final),
        "dollars_per_m_output": {"base": before, "full": full, "final": final},
        "prices_per_hour": [price.per_hour for price in found.prices],
        "claims": [asdict(claim) for claim in CLAIMS],
        "hardware_axis": [asdict(axis) for axis in axes],
        "sets": [_plain_measured(run) for run in found.runs],
    }


def _plain_measured(measured: "Measured") -> dict[str, Any]:
    return {
        "on": sorted(measured.on),
        "device": measured.device,
        "output_tokens_s_device": measured.tokens_s_device,
        "tokens_s_user": measured.user_tokens_s,
        "in_flight": measured.in_flight,
        "simulations": measured.simulations,
    }


def _show(question: "Question", found: "Waterfall", skipped: dict[str, str], orders: int) -> None:
    from kvmesh.integration.planning.claims import of
    from kvmesh.integration.planning.switches import TITLES

    rows = [_row(TITLES[step.name], step) for step in found.steps]
    if found.hardware is not None:
        rows.append(_row(found.hardware.name, found.hardware))
    title = f"{question.model.name}, {question.workload.title}: {found.base.device}"
    print_table(title, ("step", ">factor", ">least", ">most"), rows)
    before, full, final = found.dollars
    out = console()
    out.print(
        f"\n{found.base.tokens_s_device:,.0f} output tokens/s per device and ${before:.3g} per M "
        f"with none on; {found.full.tokens_s_device:,.0f} and ${full:.3g} with all "
        f"(x {found.software:.2f}); {found.final.tokens_s_device:,.0f} and ${final:.3g} on "
        f"{found.final.device} (x {found.total:.2f})"
    )
    out.print(
        f"the best factor of each, multiplied, would claim x {found.best_cases:.2f} for what "
        f"measures x {found.software:.2f}"
    )
    for name, why in skipped.items():
        out.print(f"not switched: {TITLES[name]}: {why}")
    claims = [
        *((found.software, claim) for claim in of("all")),
        *((_factor(found, "kv"), claim) for claim in of("kv")),
        *((found.hardware.factor if found.hardware else None, c) for c in of("hardware")),
    ]
    print_table(
        "\npublished, of other workloads",
        ("claim", ">published", ">here", "tag"),
        [_claim(here, claim) for here, claim in claims],
    )
    out.print(f"\nsimulated; mean over {orders} orders, least and most of any of them")


def _show_axes(found: "Waterfall", axes: "list[Axis]") -> None:
    if not axes:
        return
    out, first = console(), axes[0]
    out.print(
        f"{found.final.device} over {found.base.device} in the steady state: at most "
        f"x {first.most:.1f} at any speed that {found.base.device} reaches "
        f"({first.old_reaches:,.0f} tok/s per user)"
    )
    for axis in axes:
        at = axis.at_user_tokens_s
        told = f"from {at:,.0f} tok/s per user" if at else "nowhere on this workload"
        out.print(f"  a factor of {axis.claim.factor:g} appears {told}")


def _factor(found: "Waterfall", name: str) -> float | None:
    return next((step.factor for step in found.steps if step.name == name), None)


def _row(name: str, step: "Contribution") -> tuple[str, ...]:
    return (name, f"{step.factor:.2f}", f"{step.low:.2f}", f"{step.high:.2f}")


def _claim(here: float | None, claim: "Claim") -> tuple[str, ...]:
    measured = "" if here is None else f"{here:.2f}"
    return (claim.what, f"{claim.factor:g}", measured, claim.tag)
