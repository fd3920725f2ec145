"""`kvmesh plan waterfall`: what each optimisation, and then the hardware, contributes on a workload.

The worth of a set of optimisations is the output tokens/s per device at the highest load that keeps
the workload's limits, found by simulating a closed loop at a few loads. Every set is simulated; no
published factor is multiplied in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvmesh.backends.cost.price import Price, dollars_per_mtok
from kvmesh.backends.devices.device import Device
from kvmesh.integration.planning.compare import PlanError, Question
from kvmesh.integration.planning.requests import interleaved
from kvmesh.integration.planning.shapley import Contribution, contributions, subsets
from kvmesh.integration.planning.switches import TITLES, Setup, applicable, scenario_of
from kvmesh.integration.simulate import ClosedLoop, Load, Result, Scenario, load_of, simulate

KEPT = 0.95  # share of the requests that must keep the limits
_FIRST_LOAD = 8  # requests in flight per device
_STEP = 1.6  # from one load to the next
_MOST_LOADS = 10
_FLAT = 1.02  # a load that brings less than this is not worth looking beyond


@dataclass(frozen=True, slots=True)
class Measured:
    """One set of optimisations on one device. tokens_s_device, user_tokens_s: at the load that
    keeps the limits, in_flight requests. simulations: that it took to find it."""

    on: frozenset[str]
    device: str
    tokens_s_device: float
    user_tokens_s: float
    in_flight: float
    simulations: int


@dataclass(frozen=True, slots=True)
class Ran:
    """One load. slack: the worst of p95 over its limit; at most 1 keeps them."""

    in_flight: int
    slack: float
    tokens_s_device: float
    user_tokens_s: float


@dataclass(slots=True)
class Bench:
    """Measures sets of optimisations, each once. requests: of one simulation. done: called after
    each set."""

    question: Question
    setup: Setup
    requests: int
    seed: int
    done: Callable[[], None] = lambda: None
    known: dict[tuple[str, frozenset[str]], Measured] = field(default_factory=dict)
    _loads: dict[int, Load] = field(default_factory=dict)

    def measure(self, on: frozenset[str], device: Device) -> Measured:
        key = device.name, on
        if key not in self.known:
            self.known[key] = self._search(on, device)
            self.done()
        return self.known[key]

    def _search(self, on: frozenset[str], device: Device) -> Measured:
        """Raises the load until a limit is passed (or lowers it until all are kept), then goes
        between the two in proportion of the logarithms."""
        scenario = scenario_of(self.setup, on, device)
        ran: dict[int, Ran] = {}
        load = self._first(on, device, scenario)
        while len(ran) < _MOST_LOADS:
            found = ran[load] = self._run(scenario, load)
            up = found.slack <= 1
            load = math.ceil(load * _STEP) if up else max(1, math.floor(load / _STEP))
            if load in ran or (up and self._flat(ran, found)):
                break
        return _limit(on, device, list(ran.values()))

    def _first(self, on: frozenset[str], device: Device, scenario: Scenario) -> int:
        """Where a set with one less ended, if that is known: most change little."""
        near = [
            found.in_flight
            for (name, other), found in self.known.items()
            if name == device.name and other < on and len(other) == len(on) - 1
        ]
        guess = float(np.median(near)) if near else _FIRST_LOAD * scenario.devices
        return max(1, round(guess))

    def _flat(self, ran: dict[int, Ran], found: Ran) -> bool:
        """Whether more load brings nothing more: memory or the devices are full."""
        before = [each for each in ran.values() if each.in_flight < found.in_flight]
        most = max((each.tokens_s_device for each in before), default=0.0)
        return found.tokens_s_device < most * _FLAT or found.in_flight >= self.requests / 2

    def _run(self, scenario: Scenario, in_flight: int) -> Ran:
        result = simulate(scenario, self._load(in_flight), self.seed)
        if result.finished < result.requests:
            raise PlanError(f"simulated requests failed: {result.first_error}")
        return Ran(in_flight, self._slack(result), *_speeds(result))

    def _load(self, in_flight: int) -> Load:
        """Sessions pause between turns, so more of them are open than requests are in flight."""
        if in_flight not in self._loads:
            workload, goals = self.question.workload, self.question.goals
            turn_s = workload.output.mean * (goals.tpot_s or 0.05)
            active = round(in_flight * (1 + workload.session.pause_s / turn_s))
            active = max(in_flight, min(active, self.requests // 2))
            made = interleaved(workload, self.requests, active, self.seed)
            loop = ClosedLoop(in_flight)
            shared = workload.share_prefixes
            self._loads[in_flight] = load_of(made, self.setup.model.max_context, loop, shared)
        return self._loads[in_flight]

    def _slack(self, result: Result) -> float:
        goals = self.question.goals
        pairs = ((goals.ttft_s, "ttft_s"), (goals.tpot_s, "tpot_s"))
        return max(
            (_tail(result, name) / limit for limit, name in pairs if limit is not None),
            default=0.0,
        )


def _middle(result: Result) -> tuple[object, ...]:
    """Records without the first fifth, in which the loop fills up."""
    return result.records[len(result.records) // 5 :]


def _tail(result: Result, name: str) -> float:
    values = [getattr(record, name) for record in _middle(result)]
    known = [value for value in values if value is not None]
    return float(np.quantile(known, KEPT)) if known else 0.0


def _speeds(result: Result) -> tuple[float, float]:
    return result.steady.tokens_per_s_device, 1 / result.tpot.p50 if result.tpot.p50 else 0.0


def _limit(on: frozenset[str], device: Device, ran: Sequence[Ran]) -> Measured:
    """Where the slack is 1, between the last load that keeps the limits and the first that does
    not; the least load, if none keeps them."""
    kept = [each for each in ran if each.slack <= 1]
    count = len(ran)
    if not kept:
        least = min(ran, key=lambda each: each.in_flight)
        return Measured(
            on, device.name, least.tokens_s_device / least.slack, least.user_tokens_s, 1.0, count
        )
    best = max(kept, key=lambda each: each.tokens_s_device)
    over = [each for each in ran if each.slack > 1 and each.in_flight > best.in_flight]
    if not over:
        return _measured(on, device, best, best, 0.0, count)
    worse = min(over, key=lambda each: each.in_flight)
    span = math.log(worse.slack / max(best.slack, 1e-9))
    share = 0.0 if span <= 0 else min(1.0, max(0.0, -math.log(max(best.slack, 1e-9)) / span))
    return _measured(on, device, best, worse, share, count)


def _measured(
    on: frozenset[str], device: Device, low: Ran, high: Ran, share: float, count: int
) -> Measured:
    def between(name: str) -> float:
        a, b = float(getattr(low, name)), float(getattr(high, name))
        return a ** (1 - share) * b**share

    speeds = between("tokens_s_device"), between("user_tokens_s")
    return Measured(on, device.name, *speeds, between("in_flight"), count)


@dataclass(frozen=True, slots=True)
class Waterfall:
    """steps: by falling factor. hardware: the other device's, with everything on; its low and high
    are those with nothing and with everything on. skipped: what can change nothing here, and why.
    """

    steps: tuple[Contribution, ...]
    hardware: Contribution | None
    skipped: dict[str, str]
    base: Measured
    full: Measured
    final: Measured
    prices: tuple[Price, Price]
    runs: tuple[Measured, ...] = field(repr=False)

    @property
    def software(self) -> float:
        """All optimisations together: measured, not multiplied."""
        return self.full.tokens_s_device / self.base.tokens_s_device

    @property
    def alone(self) -> float:
        """What multiplying the factors that each has alone would claim."""
        runs = {run.on: run for run in self.runs if run.device == self.base.device}
        singles = [run for on, run in runs.items() if len(on) == 1]
        ratios = [run.tokens_s_device / self.base.tokens_s_device for run in singles]
        return math.prod(ratios)

    @property
    def dollars(self) -> tuple[float, float, float]:
        """Per million output tokens: before, with everything on, and on the other device."""
        before, after = (price.per_hour for price in self.prices)
        return (
            dollars_per_mtok(before, self.base.tokens_s_device),
            dollars_per_mtok(before, self.full.tokens_s_device),
            dollars_per_mtok(after, self.final.tokens_s_device),
        )


def simulations(names: Sequence[str], hardware: bool) -> int:
    """Sets of optimisations that waterfall() measures."""
    return 2 ** len(names) + 2 * hardware


def active_names(bench: Bench, wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(those that can change something here, the others with their reasons).

    Raises PlanError for an unknown name, or if none is left.
    """
    for name in wanted:
        if name not in TITLES:
            raise PlanError(f"optimisation {name!r} is unknown; known: {', '.join(TITLES)}")
    why = applicable(bench.question.model, bench.question.workload, bench.setup.instances)
    active = [name for name in TITLES if name in wanted and not why[name]]
    if not active:
        raise PlanError(f"no optimisation of {', '.join(wanted)} can change anything here")
    return active, {name: why[name] for name in wanted if why[name]}


def waterfall(
    bench: Bench,
    wanted: Sequence[str],
    devices: tuple[Device, Device | None],
    prices: tuple[Price, Price],
) -> Waterfall:
    """Raises PlanError for unknown names, and what simulate() raises."""
    names, skipped = active_names(bench, wanted)
    device, other = devices
    for subset in subsets(names):  # smaller sets first: their loads are a start for larger ones
        bench.measure(subset, device)
    steps = contributions(names, lambda on: bench.measure(on, device).tokens_s_device)
    base, full = bench.measure(frozenset(), device), bench.measure(frozenset(names), device)
    hardware, final = None, full
    if other is not None:
        final = bench.measure(frozenset(names), other)
        bare = bench.measure(frozenset(), other).tokens_s_device / base.tokens_s_device
        ratio = final.tokens_s_device / full.tokens_s_device
        title = f"{device.name} to {other.name}"
        hardware = Contribution(title, ratio, min(bare, ratio), max(bare, ratio))
    ordered = tuple(sorted(steps, key=lambda step: -step.factor))
    runs = tuple(bench.known.values())
    return Waterfall(ordered, hardware, skipped, base, full, final, prices, runs)
