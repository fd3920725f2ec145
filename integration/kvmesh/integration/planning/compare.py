"""`kvmesh plan`: choices side by side for one model and one traffic, and their Pareto plot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmesh.backends.architectures import ModelShape, load_shape
from kvmesh.backends.errors import BackendError
from kvmesh.integration.planning.choice import Choice, read_choice
from kvmesh.integration.planning.evaluate import Evaluated, Goals, evaluate
from kvmesh.integration.planning.requests import mix
from kvmesh.integration.planning.steady import Traffic
from kvmesh.integration.planning.traffic import Workload, load_workload
from kvmesh.integration.plot_scale import Axis
from kvmesh.integration.plots import Line, LinePlot, line_plot
from kvmesh.services.common.errors import ConfigError

DEFAULT_CHOICES = ("h200", "b200", "gb300", "rubin")
DEFAULT_MODEL = "llama-3.1-70b"  # of a workload that names none
MAX_CHOICES = 64


class PlanError(ConfigError):
    """A plan that cannot be made; the message names the field, its value and its limit."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be planned for. hits: share of the reusable prompt tokens that a cache has."""

    model: ModelShape
    workload: Workload
    traffic: Traffic
    goals: Goals


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice's; error: why it cannot run this model, in which case nothing is found."""

    choice: Choice
    found: Evaluated | None
    error: str = ""


def ask(
    workload: str,
    model: str | None = None,
    hits: float = 1.0,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
) -> Question:
    """The limits of the workload's scenario, unless others are given.

    Raises WorkloadError or ShapeError for an unknown or wrong file, PlanError for what is out of
    its limits.
    """
    found = load_workload(workload)
    name = model or found.model or DEFAULT_MODEL
    if not 0 <= hits <= 1:
        raise PlanError(f"hits is {hits:g}, must be from 0 to 1")
    for field, value in (("ttft_ms", ttft_ms), ("tpot_ms", tpot_ms)):
        if value is not None and not 0 < value < float("inf"):
            raise PlanError(f"{field} is {value:g}, must be greater than 0")
    shape = load_shape(name)
    traffic = mix(found, hits=hits)
    longest = traffic.inputs.longest + traffic.outputs.mean
    if longest > shape.max_context:
        raise PlanError(
            f"workload {found.name} has prompts of {traffic.inputs.longest:,.0f} tokens, must with "
            f"their outputs fit the {shape.max_context:,} of {shape.name}"
        )
    scenario = found.scenario
    goals = Goals(_seconds(ttft_ms or scenario.ttft_ms), _seconds(tpot_ms or scenario.tpot_ms))
    return Question(shape, found, traffic, goals)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def read_choices(lines: Sequence[str], folder: Path | None = None) -> list[Choice]:
    """Raises PlanError for none or too many, and what read_choice raises."""
    if not 1 <= len(lines) <= MAX_CHOICES:
        raise PlanError(f"{len(lines)} choices, must be 1 to {MAX_CHOICES}")
    return [read_choice(line, folder) for line in lines]


def compare(
    question: Question, choices: Sequence[Choice], done: Callable[[], None] = lambda: None
) -> list[Answer]:
    """One answer for each choice, in order; done is called after each."""
    answers = []
    for choice in choices:
        answers.append(_answer(question, choice))
        done()
    return answers


def _answer(question: Question, choice: Choice) -> Answer:
    try:
        found = evaluate(choice, question.model, question.traffic, question.goals)
    except BackendError as error:  # one choice that cannot be does not hide the others
        return Answer(choice, None, str(error))
    return Answer(choice, found)


def pareto_plot(question: Question, answers: Sequence[Answer]) -> str:
    """SVG: tokens/s of a device against tokens/s of a user, one curve per choice.

    Raises PlanError if no choice has a point.
    """
    lines = [
        Line(
            answer.choice.label,
            [(p.user_tokens_s, p.output_tokens_s) for p in answer.found.frontier],
        )
        for answer in answers
        if answer.found is not None
    ]
    if not lines:
        raise PlanError("no choice can run the model, so there is nothing to plot")
    title = f"{question.model.name}, {question.workload.title} (simulated)"
    return line_plot(
        LinePlot(
            title,
            Axis("output tokens/s of a user", "log"),
            Axis("output tokens/s of a device", "log"),
            lines,
            note="simulated, steady state; all devices counted",
            width=860,
        )
    )
