"""How many steps of the cost model a second of one core holds: what a simulation can afford."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.cost.parallel import Formats, Options, Parallel
from kvmesh.backends.cost.shapes import StepWork
from kvmesh.backends.cost.step import StepCost
from kvmesh.backends.devices import load_device

CASES = 4
_WORKS = 2048  # different steps, so that nothing is found again


@dataclass(frozen=True, slots=True)
class CostRow:
    """Evaluations per CPU second of one core, medians. Nothing of a device is measured."""

    case: str
    steps_per_s: float
    breakdowns_per_s: float  # with every op's seconds, FLOPs and bytes


def _cases() -> dict[str, StepCost]:
    gb300 = load_device("gb300")
    return {
        "llama-3.1-8b, h100, dense": StepCost(load_device("h100"), load_shape("llama-3.1-8b")),
        "llama-3.1-405b, gb300, TP8, k4v4": StepCost(
            gb300, load_shape("llama-3.1-405b"), Parallel(tensor=8), Formats("nvfp4", "k4v4")
        ),
        "deepseek-r1, gb300, EP8, power law": StepCost(
            gb300,
            load_shape("deepseek-r1"),
            Parallel(data=8, expert=8),
            Formats("nvfp4", "fp8"),
            Options("power_law"),
        ),
        "deepseek-r1, gb300, EP16, 3 drafts": StepCost(
            gb300,
            load_shape("deepseek-r1"),
            Parallel(data=16, expert=16),
            Formats("nvfp4", "fp8"),
            Options(draft_tokens=3),
        ),
    }


def bench_cost(rounds: int, advance: Callable[[], None]) -> list[CostRow]:
    """rounds: of each case; advance is called after each."""
    works = _works()
    rows = []
    for name, cost in _cases().items():
        steps, breakdowns = [], []
        for _ in range(rounds):
            steps.append(_rate(cost.seconds, works))
            breakdowns.append(_rate(_Breakdown(cost), works[:128]))
            advance()
        rows.append(CostRow(name, statistics.median(steps), statistics.median(breakdowns)))
    return rows


@dataclass(frozen=True, slots=True)
class _Breakdown:
    cost: StepCost

    def __call__(self, work: StepWork) -> dict[str, float]:
        return self.cost.step(work).by_name()


def _works() -> list[StepWork]:
    rng = np.random.default_rng(0)
    sequences = rng.integers(1, 512, _WORKS).tolist()
    contexts = rng.integers(64, 16384, _WORKS).tolist()
    chunks = (rng.integers(0, 2, _WORKS) * rng.integers(1, 4096, _WORKS)).tolist()
    return [
        StepWork(n, min(1, n), n * (n + 1) // 2, n, min(1, n), s, s * c)
        for s, c, n in zip(sequences, contexts, chunks, strict=True)
    ]


def _rate(run: Callable[[StepWork], object], works: list[StepWork]) -> float:
    # The thread's own CPU seconds: one core is all it uses, and what else runs should not count.
    start = time.thread_time()
    for work in works:
        run(work)
    return len(works) / (time.thread_time() - start)
