"""`kvmesh plan budget`: a traffic that grows, as devices, power and dollars per month.

Devices are bought for the busiest hour: requests per day x peak / 86,400 seconds, at the load at
which the choice is cheapest within the limits, in whole instances. They cost all month.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.integration.planning.compare import Answer, PlanError, Question
from kvmesh.integration.planning.evaluate import Point
from kvmesh.integration.plot_scale import Axis
from kvmesh.integration.plots import Line, LinePlot, line_plot

DAY_S = 86_400.0
MONTH_HOURS = 8760 / 12
MAX_MONTHS = 120


@dataclass(frozen=True, slots=True)
class Growth:
    """requests_day: in the first month. growth: more per month, .1 is a tenth. peak: the busiest
    hour over the mean one. headroom: share of the devices that is kept free.

    Raises PlanError for a value out of its limits.
    """

    requests_day: float
    growth: float = 0.0
    months: int = 12
    peak: float = 2.0
    headroom: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.requests_day < math.inf:
            raise PlanError(f"requests_day is {self.requests_day:g}, must be greater than 0")
        if not -1 < self.growth <= 10:
            raise PlanError(f"growth is {self.growth:g} per month, must be above -1 and at most 10")
        if not 1 <= self.months <= MAX_MONTHS:
            raise PlanError(f"months is {self.months}, must be in 1..{MAX_MONTHS}")
        if not 1 <= self.peak <= 100:
            raise PlanError(f"peak is {self.peak:g}, must be in 1..100")
        if not 0 <= self.headroom < 1:
            raise PlanError(f"headroom is {self.headroom:g}, must be at least 0 and below 1")

    def requests(self, month: int) -> float:
        """Per day, in month 0, 1, ..."""
        return self.requests_day * (1 + self.growth) ** month


@dataclass(frozen=True, slots=True)
class Month:
    """devices: that stand there. watts: None where no power is published. used: share of the
    devices' throughput that the mean hour takes."""

    month: int
    requests_day: float
    peak_requests_s: float
    devices: int
    watts: float | None
    dollars: float
    used: float

    @property
    def energy_kwh(self) -> float | None:
        return None if self.watts is None else self.watts / 1e3 * MONTH_HOURS


@dataclass(frozen=True, slots=True)
class Budget:
    """One choice's months; error: why it has none."""

    label: str
    months: tuple[Month, ...]
    error: str = ""

    @property
    def dollars(self) -> float:
        return sum(month.dollars for month in self.months)


def budget(question: Question, answers: Sequence[Answer], growth: Growth) -> list[Budget]:
    """One for each answer, in order."""
    return [_budget(question, answer, growth) for answer in answers]


def _budget(question: Question, answer: Answer, growth: Growth) -> Budget:
    best = answer.found.best if answer.found else None
    if best is None:
        missed = answer.found.misses(question.goals) if answer.found else ""
        return Budget(answer.choice.label, (), answer.error or missed)
    outputs = question.traffic.outputs.mean
    months = (_month(answer, best, growth, month, outputs) for month in range(growth.months))
    return Budget(answer.choice.label, tuple(months))


def _month(answer: Answer, best: Point, growth: Growth, month: int, outputs: float) -> Month:
    requests = growth.requests(month)
    peak = requests / DAY_S * growth.peak
    per_device = best.output_tokens_s / outputs  # requests per second
    wanted = peak / (1 - growth.headroom) / per_device
    # Whole instances; where prompts have a pool of their own, that is in proportion.
    instance = best.layout.devices
    instances = math.ceil(wanted * (instance / best.devices) / instance)
    devices = math.ceil(instances * best.devices - 1e-9)
    choice = answer.choice
    watts = choice.device.power.all_in_w or choice.device.power.tgp_w
    return Month(
        month,
        requests,
        peak,
        devices,
        devices * watts.value if watts else None,
        devices * choice.price.per_hour * MONTH_HOURS,
        requests / DAY_S / (devices * per_device),
    )


def budget_plot(question: Question, budgets: Sequence[Budget]) -> str:
    """SVG: dollars per month over the months. Raises PlanError if no choice has any."""
    lines = [
        Line(each.label, [(m.month + 1, m.dollars) for m in each.months])
        for each in budgets
        if each.months
    ]
    if not lines:
        raise PlanError("no choice keeps the limits, so there is nothing to plot")
    title = f"{question.model.name}, {question.workload.title}: dollars per month (simulated)"
    note = "simulated, steady state; devices for the busiest hour, paid for the whole month"
    x, y = Axis("month"), Axis("dollars per month", low=0)
    return line_plot(LinePlot(title, x, y, lines, note=note, width=860))
