"""A choice under a traffic: throughput, speed of one user, cost and energy, over all loads.

By the steady state (steady.py), so every point is an average over a long time at that load; tails
are for the simulator. All devices count, those that compute prompts too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvmesh.backends.architectures import ModelShape
from kvmesh.backends.cost.parallel import Options, Parallel
from kvmesh.backends.cost.price import dollars_per_mtok
from kvmesh.backends.cost.step import StepCost
from kvmesh.integration.planning.choice import ACCEPTANCE, Choice, layouts, prefill_layout
from kvmesh.integration.planning.steady import Limits, Steady, SteadyState, Traffic

STEP_TOKENS = 8192
_SWEEP = tuple(2 ** (step / 2) for step in range(27))  # sequences of a rank, 1 to 8,192
# p99 over mean TPOT of runs at their limit: C5, C6 and C7 of the calibration set have 1.28 (at the
# least), 1.35 and 1.21. A steady state has no tail of its own.
TAIL = 1.25
_HALVINGS = 6  # to find where a limit is passed


@dataclass(frozen=True, slots=True)
class Goals:
    """Most seconds until the first token, on average and without queues, and between tokens for
    99 % of requests; None: any."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One load on one layout. *_tokens_s: per device, of all devices. dollars_*: all dollars, per
    million tokens of that kind. joules: per output token, None where no power is published."""

    layout: Parallel
    sequences: float
    output_tokens_s: float
    input_tokens_s: float
    user_tokens_s: float
    ttft_s: float
    dollars_output: float
    dollars_input: float
    dollars_total: float
    joules: float | None
    devices: float
    binds: str
    meets: bool

    @property
    def tokens_per_joule(self) -> float | None:
        return 1 / self.joules if self.joules else None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """points: by rising load, of every layout tried. best: the cheapest that meets the goals, None
    if none does. frontier: no other point is better in both speeds."""

    choice: Choice
    points: tuple[Point, ...]
    best: Point | None

    def misses(self, goals: Goals) -> str:
        """Which limit no load keeps, and what comes nearest; empty if `best` is there."""
        if self.best is not None:
            return ""
        fastest = TAIL * min(1 / point.user_tokens_s for point in self.points)
        soonest = min(point.ttft_s for point in self.points)
        if goals.tpot_s is not None and fastest > goals.tpot_s:
            return f"TPOT is at least {fastest * 1e3:,.3g} ms, must be at most {_ms(goals.tpot_s)}"
        if goals.ttft_s is not None and soonest > goals.ttft_s:
            return f"TTFT is at least {soonest * 1e3:,.3g} ms, must be at most {_ms(goals.ttft_s)}"
        return "TTFT and TPOT keep their limits at different loads or layouts, never both at one"

    @property
    def frontier(self) -> tuple[Point, ...]:
        kept: list[Point] = []
        for point in sorted(self.points, key=lambda p: (-p.user_tokens_s, -p.output_tokens_s)):
            if not kept or point.output_tokens_s > kept[-1].output_tokens_s:
                kept.append(point)
        return tuple(kept)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms"


def mean_accepted(drafts: int) -> float:
    """Tokens per step and sequence, the one beside the drafts included."""
    total, chance = 1.0, 1.0
    for position in range(drafts):
        chance *= ACCEPTANCE[position]
        total += chance
    return total


def evaluate(choice: Choice, model: ModelShape, traffic: Traffic, goals: Goals) -> Evaluated:
    """Raises DoesNotFit if no layout holds the model, ShapeError and DeviceError as StepCost."""
    points = [
        point
        for layout in layouts(choice, model)
        for point in _points(choice, model, traffic, goals, layout)
    ]
    meeting = [point for point in points if point.meets]
    best = min(meeting, key=lambda p: p.dollars_output, default=None)
    return Evaluated(choice, tuple(points), best)


def _points(
    choice: Choice, model: ModelShape, traffic: Traffic, goals: Goals, layout: Parallel
) -> Iterator[Point]:
    decode = Traffic(traffic.inputs, traffic.outputs, 1.0 if choice.prefill else traffic.cached)
    limits = Limits(step_tokens=STEP_TOKENS, accepted=mean_accepted(choice.drafts))
    state = SteadyState(_cost(choice, model, layout, choice.drafts), decode, limits)
    most, binds = state.most()
    pool = _prefill(choice, model, traffic)

    def at(sequences: float) -> Point:
        steady = state.at(sequences, binds if sequences == most else "load")
        return _point(choice, traffic, goals, (layout, state, steady), pool)

    last: Point | None = None
    for sequences in (*(s for s in _SWEEP if s < most), most):
        point = at(sequences)
        if last is not None and last.meets and not point.meets:
            yield _edge(at, last, point)
        yield point
        last = point


def _edge(at: Callable[[float], Point], low: Point, high: Point) -> Point:
    """The most sequences that keep the limits, between a load that does and one that does not."""
    for _ in range(_HALVINGS):
        middle = at((low.sequences + high.sequences) / 2)
        low, high = (middle, high) if middle.meets else (low, middle)
    return replace(low, binds="limits")


def _prefill(
    choice: Choice, model: ModelShape, traffic: Traffic
) -> tuple[float, float, int] | None:
    """(prompts per second, seconds of one prompt, devices) of the pool for prompts."""
    layout = prefill_layout(choice, model)
    if layout is None:
        return None
    limits = Limits(step_tokens=STEP_TOKENS)
    state = SteadyState(_cost(choice, model, layout, 0), traffic, limits)
    rate, seconds = state.prompts()
    return rate, seconds, layout.devices


def _cost(choice: Choice, model: ModelShape, layout: Parallel, drafts: int) -> StepCost:
    options = Options("placed", draft_tokens=drafts)
    return StepCost(choice.device, model, layout, choice.formats, options)


def _point(
    choice: Choice,
    traffic: Traffic,
    goals: Goals,
    run: tuple[Parallel, SteadyState, Steady],
    pool: tuple[float, float, int] | None,
) -> Point:
    layout, state, steady = run
    requests_s = steady.output_tokens_s / traffic.outputs.mean
    devices = float(steady.devices)
    if pool is None:
        ttft = state.first_token_s(steady)
    else:
        rate, seconds, pool_devices = pool
        devices += requests_s / rate * pool_devices
        ttft = seconds + steady.step_s
    output = steady.output_tokens_s / devices
    inputs = requests_s * traffic.inputs.mean / devices
    hour = choice.price.per_hour
    watts = choice.device.power.all_in_w or choice.device.power.tgp_w
    slow = goals.tpot_s is not None and steady.tpot_s * TAIL > goals.tpot_s
    late = goals.ttft_s is not None and ttft > goals.ttft_s
    return Point(
        layout,
        steady.sequences,
        output,
        inputs,
        1 / steady.tpot_s,
        ttft,
        dollars_per_mtok(hour, output),
        dollars_per_mtok(hour, inputs),
        dollars_per_mtok(hour, output + inputs),
        watts.value / output if watts else None,
        devices,
        steady.binds,
        not (slow or late),
    )
