"""`kvmesh plan waterfall`: what each optimisation, and then the hardware, does for a workload.

The worth of a set of optimisations is the output tokens/s per device at the highest load that keeps
the workload's limits, found by simulating a closed loop at a few loads. Every set is simulated; no
published factor is multiplied in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvmesh.backends.cost.parallel import Formats
from kvmesh.backends.cost.price import Price, dollars_per_mtok
from kvmesh.backends.devices.device import Device
from kvmesh.integration.planning.choice import default_weights
from kvmesh.integration.planning.compare import PlanError, Question
from kvmesh.integration.planning.requests import interleaved
from kvmesh.integration.planning.shapley import (
    Contribution,
    Order,
    contributions,
    orders_of,
    sets_of,
)
from kvmesh.integration.planning.switches import (
    TITLES,
    Setup,
    applicable,
    counted_devices,
    scenario_of,
    setup_of,
)
from kvmesh.integration.simulate import ClosedLoop, Load, Result, Scenario, load_of, simulate

Prices = tuple[Price, Price]
LEAST_REQUESTS, MOST_REQUESTS = 50, 100_000
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


def _tail(result: Result, name: str) -> float:
    """p95 without the first fifth of the requests, in which the loop fills up."""
    records = result.records[len(result.records) // 5 :]
    values = [getattr(record, name) for record in records]
    known = [value for value in values if value is not None]
    return float(np.quantile(known, KEPT)) if known else 0.0


def _speeds(result: Result) -> tuple[float, float]:
    per_device = result.steady.tokens_per_s / counted_devices(result)
    return per_device, 1 / result.tpot.p50 if result.tpot.p50 else 0.0


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
        return float(a ** (1 - share) * b**share)

    speeds = between("tokens_s_device"), between("user_tokens_s")
    return Measured(on, device.name, *speeds, between("in_flight"), count)


@dataclass(frozen=True, slots=True)
class Waterfall:
    """steps: by falling factor. hardware: the other device's, with everything on; its low and high
    are those with nothing and with everything on."""

    steps: tuple[Contribution, ...]
    hardware: Contribution | None
    base: Measured
    full: Measured
    final: Measured
    prices: Prices
    runs: tuple[Measured, ...] = field(repr=False)

    @property
    def software(self) -> float:
        """All optimisations together: measured, not multiplied."""
        return self.full.tokens_s_device / self.base.tokens_s_device

    @property
    def total(self) -> float:
        return self.final.tokens_s_device / self.base.tokens_s_device

    @property
    def best_cases(self) -> float:
        """What multiplying the best factor of each would claim."""
        return float(math.prod(step.high for step in self.steps))

    @property
    def dollars(self) -> tuple[float, float, float]:
        """Per million output tokens: before, with everything on, and on the other device."""
        before, after = (price.per_hour for price in self.prices)
        return (
            dollars_per_mtok(before, self.base.tokens_s_device),
            dollars_per_mtok(before, self.full.tokens_s_device),
            dollars_per_mtok(after, self.final.tokens_s_device),
        )


def bench_of(question: Question, device: Device, kv: str, effort: tuple[int, int]) -> Bench:
    """effort: requests of each simulation, and the seed. Weights are the device's smallest.

    Raises PlanError for too few requests, ShapeError for an unknown format, DoesNotFit if nothing
    holds the model.
    """
    requests, seed = effort
    if not LEAST_REQUESTS <= requests <= MOST_REQUESTS:
        raise PlanError(f"requests is {requests}, must be in {LEAST_REQUESTS}..{MOST_REQUESTS}")
    weights = default_weights(device)
    attention = "fp8" if weights == "nvfp4" else None
    Formats(weights, kv)  # says what formats there are
    setup = setup_of(question.model, device, Formats(weights, kv, attention), kv)
    return Bench(question, setup, requests, seed)


def plan_orders(
    bench: Bench, wanted: Sequence[str] | None, most: int
) -> tuple[list[Order], dict[str, str]]:
    """(orders in which those that can change something here are switched on, the others with their
    reasons). most: 0 takes all orders.

    Raises PlanError for an unknown name, if none is left, or a negative number.
    """
    wanted = list(wanted or TITLES)
    for name in wanted:
        if name not in TITLES:
            raise PlanError(f"optimisation {name!r} is unknown; known: {', '.join(TITLES)}")
    if most < 0:
        raise PlanError(f"orders is {most}, must be at least 1, or 0 for all")
    why = applicable(bench.question.model, bench.question.workload, bench.setup.instances)
    active = [name for name in TITLES if name in wanted and not why[name]]
    if not active:
        raise PlanError(f"no optimisation of {', '.join(wanted)} can change anything here")
    skipped = {name: why[name] for name in wanted if why[name]}
    return orders_of(active, most or None, bench.seed), skipped


def sets_to_measure(orders: Sequence[Order], hardware: bool) -> int:
    """How often Bench.done will be called."""
    return len(sets_of(orders)) + 2 * hardware


def waterfall(
    bench: Bench, orders: Sequence[Order], devices: tuple[Device, Device | None], prices: Prices
) -> Waterfall:
    """All sets that the orders pass on the first device; none and all on the second.

    Raises what simulate() raises.
    """
    device, other = devices
    sets = sets_of(orders)  # smaller ones first: where they ended is a start for larger ones
    for on in sets:
        bench.measure(on, device)
    steps = contributions(orders, lambda on: bench.measure(on, device).tokens_s_device)
    base, full = bench.measure(sets[0], device), bench.measure(sets[-1], device)
    hardware, final = None, full
    if other is not None:
        final = bench.measure(sets[-1], other)
        bare = bench.measure(sets[0], other).tokens_s_device / base.tokens_s_device
        ratio = final.tokens_s_device / full.tokens_s_device
        title = f"{device.name} to {other.name}"
        hardware = Contribution(title, ratio, min(bare, ratio), max(bare, ratio))
    ordered = tuple(sorted(steps, key=lambda step: -step.factor))
    return Waterfall(ordered, hardware, base, full, final, prices, tuple(bench.known.values()))
