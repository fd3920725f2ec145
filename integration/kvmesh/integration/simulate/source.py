"""Where a simulated load comes from, so that the same requests can be had at any rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvmesh.integration.mlperf.schedule import arrivals
from kvmesh.integration.planning import traffic
from kvmesh.integration.planning.requests import generate
from kvmesh.integration.serve_report import Limits
from kvmesh.integration.simulate.arrivals import ClosedLoop, Load, load_of
from kvmesh.integration.simulate.scenario import ScenarioError
from kvmesh.integration.workload import Shape, Workload, poisson_load, scaled

NO_LIMITS = Limits()
MLPERF = "mlperf-"  # workloads whose arrivals are LoadGen's


@dataclass(frozen=True, slots=True)
class Source:
    """workload_at: requests at a rate of so many per second. rate: their own; None: all are there
    from the start. limits: of the scenario that it is, if it is one."""

    workload_at: Callable[[float], Workload]
    rate: float | None
    max_context: int
    loop: ClosedLoop | None = None
    share_prefixes: bool = True
    limits: Limits = NO_LIMITS

    def load(self) -> Load:
        """At its own rate."""
        return self.at(self.rate or 1.0)

    def at(self, rate: float) -> Load:
        return load_of(self.workload_at(rate), self.max_context, self.loop, self.share_prefixes)


def from_workload(workload: Workload, max_context: int, loop: ClosedLoop | None = None) -> Source:
    """A trace's requests, at their times; other rates stretch or squeeze these."""
    seconds = workload.duration_s
    rate = (len(workload.requests) - 1) / seconds if seconds > 0 else None

    def at(wanted: float) -> Workload:
        if rate is None or wanted == rate:
            return workload
        return scaled(workload, speed=wanted / rate)

    return Source(at, rate, max_context, loop)


@dataclass(frozen=True, slots=True)
class Amount:
    """How many requests: so many, and as many more as come in min_seconds. A burst that is over
    before a limit has passed says nothing about a rate."""

    requests: int
    min_seconds: float = 0.0

    def at(self, rate: float) -> int:
        return max(self.requests, math.ceil(rate * self.min_seconds))


def from_shape(shape: Shape, rate: float, amount: Amount, seed: int, max_context: int) -> Source:
    """Poisson arrivals of requests that are alike."""
    return Source(lambda r: poisson_load(shape, r, amount.at(r), seed), rate, max_context)


def from_named(
    name: str, rate: float | None, amount: Amount, seed: int, max_context: int
) -> Source:
    """A workload file (see planning.traffic), in its scenario.

    Raises WorkloadError for an unknown one, ScenarioError if its scenario needs a rate.
    """
    workload = traffic.load_workload(name)
    scenario = workload.scenario
    poisson = scenario.arrival == "poisson"
    if poisson and rate is None:
        raise ScenarioError(
            f"rate is missing, which scenario {workload.default!r} of {workload.name} needs; give "
            "--rate, or --find-max-qps"
        )
    loop = ClosedLoop(1) if scenario.arrival == "closed" else None
    limits = Limits(ttft_s=_seconds(scenario.ttft_ms), tpot_s=_seconds(scenario.tpot_ms))

    def at(wanted: float) -> Workload:
        made = generate(workload, amount.at(wanted) if poisson else amount.requests, wanted, seed)
        return _as_loadgen(made, wanted) if poisson and workload.name.startswith(MLPERF) else made

    return Source(
        at,
        rate if poisson else None,
        max_context,
        loop,
        workload.share_prefixes,
        limits,
    )


def _as_loadgen(workload: Workload, rate: float) -> Workload:
    """The same requests at the times that MLPerf's LoadGen gives them."""
    times = arrivals(rate, len(workload.requests)).tolist()
    pairs = zip(workload.requests, times, strict=True)
    return replace(workload, requests=tuple(replace(r, arrival_s=at) for r, at in pairs))


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
