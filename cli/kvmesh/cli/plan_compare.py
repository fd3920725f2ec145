"""`kvmesh plan`: what choices of device and optimisation cost for one traffic, and a budget."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.devices import Folder
from kvmesh.cli.errors import FAILED
from kvmesh.cli.options import Json, command, refuse_options
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.planning.budget import Budget
    from kvmesh.integration.planning.compare import Answer, Question
    from kvmesh.integration.planning.evaluate import Goals, Point

Choices = Annotated[
    list[str] | None,
    typer.Option(
        "--choice",
        help="A device and what is done on it, as in gb300,dep16,mtp3,disagg,p2,kv=k4v4,"
        "price=rental; give several (default: h200, b200, gb300, rubin).",
        show_default=False,
    ),
]
Plot = Annotated[Path | None, typer.Option(help="Write the plot, SVG.", show_default=False)]


@dataclass(frozen=True)
class What:
    """The traffic to plan for."""

    workload: Annotated[
        str, typer.Option(help="A workload's name, its file, or either with :scenario.")
    ] = "chat"
    model: Annotated[
        str | None,
        typer.Option(
            help="A model's name or config.json (default: the workload's, or llama-3.1-70b).",
            show_default=False,
        ),
    ] = None
    hits: Annotated[
        float, typer.Option(help="Share of the reusable prompt tokens that a cache has.")
    ] = 1.0
    ttft_ms: Annotated[
        float | None, typer.Option(help="Most milliseconds to the first token.", show_default=False)
    ] = None
    tpot_ms: Annotated[
        float | None, typer.Option(help="Most milliseconds between tokens.", show_default=False)
    ] = None


def question_of(what: What) -> "Question":
    from kvmesh.integration.planning.compare import ask

    return ask(what.workload, what.model, what.hits, what.ttft_ms, what.tpot_ms)


@command
def plan(
    context: typer.Context,
    what: What,
    choice: Choices = None,
    folder: Folder = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Compare devices and optimisations for a model and a workload: cost, energy, speed.

    Shows for each choice the cheapest load that keeps the workload's limits; exit code 1 if none
    does. All of it is simulated.
    """
    if context.invoked_subcommand is not None:
        refuse_options(context)
        return
    from kvmesh.integration.planning import compare as planning

    question = question_of(what)
    choices = planning.read_choices(choice or list(planning.DEFAULT_CHOICES), folder)
    with progress_bar("comparing", len(choices), hidden=json) as advance:
        answers = planning.compare(question, choices, advance)
    if plot is not None:
        plot.write_text(planning.pareto_plot(question, answers), encoding="utf-8")
    if json:
        print_json(
            {**plain_question(question), "choices": [_plain(a, question.goals) for a in answers]}
        )
    else:
        _show(question, answers)
        if plot is not None:
            console().print(f"Pareto plot: {plot}")
    if not any(answer.found and answer.found.best for answer in answers):
        raise typer.Exit(FAILED)


@command
def budget(
    requests_per_day: Annotated[float, typer.Option(help="In the first month.")],
    what: What,
    growth: Annotated[float, typer.Option(help="More requests per month; 0.1 is a tenth.")] = 0.0,
    months: Annotated[int, typer.Option(help="Months to plan.")] = 12,
    peak: Annotated[float, typer.Option(help="The busiest hour over the mean one.")] = 2.0,
    headroom: Annotated[float, typer.Option(help="Share of the devices kept free.")] = 0.15,
    choice: Choices = None,
    folder: Folder = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Turn requests per day, and their growth, into devices, power and dollars per month."""
    from kvmesh.integration.planning import budget as planning
    from kvmesh.integration.planning import compare as comparing

    expected = planning.Growth(requests_per_day, growth, months, peak, headroom)
    question = question_of(what)
    choices = comparing.read_choices(choice or list(comparing.DEFAULT_CHOICES), folder)
    with progress_bar("planning", len(choices), hidden=json) as advance:
        answers = comparing.compare(question, choices, advance)
    budgets = planning.budget(question, answers, expected)
    if plot is not None:
        plot.write_text(planning.budget_plot(question, budgets), encoding="utf-8")
    if json:
        told = [_plain_budget(each) for each in budgets]
        print_json({**plain_question(question), "budgets": told})
    else:
        _show_budgets(question, budgets)
        if plot is not None:
            console().print(f"plot: {plot}")
    if not any(each.months for each in budgets):
        raise typer.Exit(FAILED)


def plain_question(question: "Question") -> dict[str, Any]:
    """What was asked, as JSON."""
    return {
        "simulated": True,
        "model": question.model.name,
        "workload": question.workload.name,
        "scenario": question.workload.default,
        "ttft_s": question.goals.ttft_s,
        "tpot_s": question.goals.tpot_s,
        "mean_input_tokens": question.traffic.inputs.mean,
        "mean_output_tokens": question.traffic.outputs.mean,
        "cached_share": question.traffic.cached,
    }


def _plain(answer: "Answer", goals: "Goals") -> dict[str, Any]:
    choice = answer.choice
    told: dict[str, Any] = {
        "choice": choice.label,
        "device": choice.device.name,
        "price_per_hour": choice.price.per_hour,
        "price": choice.price.preset,
        "error": answer.error or None,
        "misses": None,
        "best": None,
        "frontier": [],
    }
    if answer.found is not None:
        best = answer.found.best
        told["best"] = _plain_point(best) if best else None
        told["misses"] = answer.found.misses(goals) or None
        told["frontier"] = [_plain_point(point) for point in answer.found.frontier]
    return told


def _plain_point(point: "Point") -> dict[str, Any]:
    return {
        "layout": layout_name(point),
        "devices": point.devices,
        "sequences": point.sequences,
        "output_tokens_s_device": point.output_tokens_s,
        "input_tokens_s_device": point.input_tokens_s,
        "tokens_s_user": point.user_tokens_s,
        "ttft_s": point.ttft_s,
        "dollars_per_m_input": point.dollars_input,
        "dollars_per_m_output": point.dollars_output,
        "dollars_per_m_total": point.dollars_total,
        "tokens_per_joule": point.tokens_per_joule,
        "binds": point.binds,
        "meets": point.meets,
    }


def layout_name(point: "Point") -> str:
    """tp8, dep16, tp2pp2, as a choice is written."""
    p = point.layout
    name = f"dep{p.data}" if p.data > 1 and p.data == p.expert else f"tp{p.tensor}"
    if name.startswith("tp"):
        name += f"dp{p.data}" if p.data > 1 else ""
        name += f"ep{p.expert}" if p.expert > 1 else ""
    return name + (f"pp{p.pipeline}" if p.pipeline > 1 else "")


def _show(question: "Question", answers: "list[Answer]") -> None:
    t, g = question.traffic, question.goals
    out = console()
    out.print(
        f"{question.model.name}, {question.workload.title} ({question.workload.default}): "
        f"{t.inputs.mean:,.0f} tokens in ({t.cached:.0%} cached), {t.outputs.mean:,.0f} out; "
        f"TTFT {_limit(g.ttft_s)}, TPOT {_limit(g.tpot_s)}"
    )
    columns = (
        "choice", "layout", ">$/h", ">$/M in", ">$/M out", ">$/M total", ">tok/J",
        ">tok/s/device", ">tok/s/user", ">TTFT", "held by",
    )  # fmt: skip
    print_table("", columns, [_row(answer) for answer in answers])
    for answer in answers:
        why = answer.error or (answer.found.misses(question.goals) if answer.found else "")
        if why:
            out.print(f"{answer.choice.label}: {why}")
    out.print(
        "\nsimulated, steady state; every dollar column divides the price of all devices by the "
        "tokens of that kind"
    )


def _limit(seconds: float | None) -> str:
    return "any" if seconds is None else f"<= {seconds * 1e3:,.0f} ms"


def _row(answer: "Answer") -> tuple[str, ...]:
    price = f"{answer.choice.price.per_hour:.2f}"
    best = answer.found.best if answer.found else None
    if best is None:
        why = "cannot run" if answer.error else "keeps no limit"
        return (answer.choice.label, why, price, *("" for _ in range(8)))
    return (
        answer.choice.label,
        layout_name(best),
        price,
        f"{best.dollars_input:.3g}",
        f"{best.dollars_output:.3g}",
        f"{best.dollars_total:.3g}",
        f"{best.tokens_per_joule:.3g}" if best.tokens_per_joule else "",
        f"{best.output_tokens_s:,.0f}",
        f"{best.user_tokens_s:,.0f}",
        f"{best.ttft_s * 1e3:,.0f} ms",
        best.binds,
    )


def _plain_budget(budget: "Budget") -> dict[str, Any]:
    return {
        "choice": budget.label,
        "error": budget.error or None,
        "dollars": budget.dollars,
        "months": [{**asdict(month), "energy_kwh": month.energy_kwh} for month in budget.months],
    }


def _show_budgets(question: "Question", budgets: "list[Budget]") -> None:
    rows = []
    for each in budgets:
        for month in each.months:
            power = "" if month.watts is None else f"{month.watts / 1e3:,.0f}"
            rows.append(
                (
                    each.label,
                    str(month.month + 1),
                    f"{month.requests_day:,.0f}",
                    f"{month.devices:,}",
                    power,
                    f"{month.dollars:,.0f}",
                    f"{month.used:.0%}",
                )
            )
    columns = ("choice", ">month", ">requests/day", ">devices", ">kW", ">$/month", ">used")
    print_table(f"{question.model.name}, {question.workload.title}", columns, rows)
    for each in budgets:
        told = each.error or f"{each.dollars:,.0f} dollars in {len(each.months)} months"
        console().print(f"{each.label}: {told}")
    console().print("\nsimulated, steady state; devices for the busiest hour, paid all month")
