"""The most requests per second that keep the limits: bisection over simulated loads."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh.integration.serve_report import Limits
from kvmesh.integration.simulate.arrivals import Load
from kvmesh.integration.simulate.result import Result
from kvmesh.integration.simulate.run import simulate
from kvmesh.integration.simulate.scenario import Scenario, ScenarioError
from kvmesh.integration.simulate.verdict import Verdict, judge

MIN_QPS, MAX_QPS = 1e-3, 1e6


@dataclass(frozen=True, slots=True)
class Trial:
    qps: float
    result: Result
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Found:
    """best: the highest rate that kept all limits; None if none did. over: the lowest that did not,
    whose verdict says what binds; None if every rate was kept."""

    best: Trial | None
    over: Trial | None
    trials: int


@dataclass(frozen=True, slots=True)
class Search:
    """load_at: the same requests at a rate of so many per second. precision: ratio of the two
    rates that the search ends between."""

    scenario: Scenario
    load_at: Callable[[float], Load]
    limits: Limits
    seed: int = 1
    start_qps: float = 1.0
    precision: float = 1.02


def find_max_qps(search: Search, on_trial: Callable[[Trial], None] = lambda trial: None) -> Found:
    """Doubles or halves from the start until the limits part the rates, then bisects.

    Raises ScenarioError if there is no limit that a rate could break.
    """
    limits = search.limits
    if all(x is None for x in (limits.ttft_s, limits.tpot_s, limits.itl_s, limits.duration_s)):
        raise ScenarioError(
            "no limit is given to search under; give --ttft-ms, --tpot-ms, --itl-ms or "
            "--latency-ms, or a workload whose scenario has limits"
        )
    best: Trial | None = None
    over: Trial | None = None
    count, qps = 0, search.start_qps
    while (best is None or over is None) and MIN_QPS <= qps <= MAX_QPS:
        trial = _try(search, qps, on_trial)
        count += 1
        if trial.verdict.met:
            best, qps = trial, qps * 2
        else:
            over, qps = trial, qps / 2
            if best is None and _alone(trial):
                break
    while best is not None and over is not None and over.qps > best.qps * search.precision:
        trial = _try(search, math.sqrt(best.qps * over.qps), on_trial)
        count += 1
        if trial.verdict.met:
            best = trial
        else:
            over = trial
    return Found(best, over, count)


def _try(search: Search, qps: float, on_trial: Callable[[Trial], None]) -> Trial:
    result = simulate(search.scenario, search.load_at(qps), search.seed)
    trial = Trial(qps, result, judge(result, search.limits))
    on_trial(trial)
    return trial


def _alone(trial: Trial) -> bool:
    """Whether hardly any two requests met: slower arrivals would change nothing."""
    most = sum(max(pool.queue.running, default=0) for pool in trial.result.pools)
    return most <= 1 or trial.qps < 2 * MIN_QPS
