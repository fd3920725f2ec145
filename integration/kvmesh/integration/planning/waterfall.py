"""`kvmesh plan waterfall`: what each optimisation, and then the hardware, contributes on a workload.

The worth of a set of optimisations is the output tokens/s per device at the highest load that keeps
the workload's limits, found by simulating a closed loop at a few loads. Every set is simulated; no
published factor is multiplied in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.backends.cost.price import Price, dollars_per_mtok
from kvmesh.backends.devices.device import Device
from kvmesh.integration.planning.compare import PlanError, Question
from kvmesh.integration.planning.requests import generate
from kvmesh.integration.planning.shapley import Contribution, contributions
from kvmesh.integration.planning.switches import TITLES, Setup, applicable, scenario_of
from kvmesh.integration.simulate import ClosedLoop, Load, Result, load_of, simulate

_FIRST_LOAD = 32  # requests in flight per device
_STEP = 2.0  # from one load to the next
_MOST_LOADS = 8
_TURNOVERS = 3  # requests of a run, in loads
_LEAST_REQUESTS = 200


@dataclass(frozen=True, slots=True)
class Measured:
    """One set of optimisations on one device. tokens_s_device: at the load that keeps the limits.
    simulations: that it took to find it."""

    on: frozenset[str]
    device: str
    tokens_s_device: float
    user_tokens_s: float
    in_flight: float
    simulations: int


@dataclass(frozen=True, slots=True)
class Waterfall:
    """hardware: the factor of the other device with everything on; its low and high are with
    nothing on and everything on. skipped: optimisations that can change nothing here, and why."""

    steps: tuple[Contribution, ...]
    hardware: Contribution | None
    skipped: dict[str, str]
    base: Measured
    full: Measured
    final: Measured
    base_price: Price
    final_price: Price
    runs: tuple[Measured, ...] = field(repr=False)

    @property
    def software(self) -> float:
        """All optimisations together, measured, not multiplied."""
        return self.full.tokens_s_device / self.base.tokens_s_device

    @property
    def total(self) -> float:
        return self.final.tokens_s_device / self.base.tokens_s_device

    @property
    def dollars(self) -> tuple[float, float]:
        """Per million output tokens: before and after."""
        before = dollars_per_mtok(self.base_price.per_hour, self.base.tokens_s_device)
        return before, dollars_per_mtok(self.final_price.per_hour, self.final.tokens_s_device)


@dataclass(slots=True)
class Bench:
    """Measures sets of optimisations, each once. done: called after each."""

    question: Question
    setup: Setup
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
        """Doubles or halves the load until the limits lie between two, then goes between them in
        proportion to the logarithms."""
        scenario = scenario_of(self.setup, on, device)
        in_flight = self._first(scenario.devices)
        ran: dict[int, tuple[float, Result]] = {}

        def run(load: int) -> float:
            if load not in ran:
                result = simulate(scenario, self._load(load), self.seed)
                ran[load] = self._slack(result), result
            return ran[load][0]

        slack = run(in_flight)
        while len(ran) < _MOST_LOADS and (slack <= 1 or in_flight > 1):
            following = int(in_flight * _STEP) if slack <= 1 else max(1, int(in_flight / _STEP))
            crossed = (run(following) <= 1) != (slack <= 1)
            in_flight, slack = following, run(following)
            if crossed or self._saturated(ran):
                break
        return self._between(on, device, ran)
