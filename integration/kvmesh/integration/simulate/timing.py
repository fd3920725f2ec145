"""How long a step of a worker takes: of all its attention ranks together, by the cost model or by a
linear estimate that was fitted on measured steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmesh.backends.base import Estimate, StepShape
from kvmesh.backends.cost.shapes import StepWork
from kvmesh.backends.cost.step import StepCost

IDLE = StepWork()


@dataclass(frozen=True, slots=True)
class StepTime:
    """occupied_s: of one stage of the pipeline. latency_s: until the tokens are out."""

    occupied_s: float
    latency_s: float


class StepTimer(Protocol):
    def time(self, works: Sequence[StepWork]) -> StepTime:
        """Of a step in which each attention rank has one of `works`."""
        ...


class CostTimer:
    """The busiest rank sets the pace; the experts' part depends on the tokens of all ranks."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._width = 1 + cost.options.draft_tokens
        self._staged = cost.parallel.pipeline > 1

    def time(self, works: Sequence[StepWork]) -> StepTime:
        if len(works) == 1:
            return self._of(works[0], None)
        tokens = [w.prefill_tokens + self._width * w.decode_sequences for w in works]
        group = float(sum(tokens))
        busiest = {max(range(len(works)), key=tokens.__getitem__)}
        busiest.add(max(range(len(works)), key=lambda rank: _attended(works[rank])))
        times = [self._of(works[rank], group) for rank in busiest if tokens[rank]]
        return max(times, key=lambda time: time.latency_s, default=StepTime(0.0, 0.0))

    def _of(self, work: StepWork, group: float | None) -> StepTime:
        if self._staged:
            step = self._cost.step(work, group)
            return StepTime(step.total_s, step.latency_s)
        seconds = self._cost.seconds(work, group)
        return StepTime(seconds, seconds)


class EstimateTimer:
    """A linear estimate of one rank."""

    def __init__(self, estimate: Estimate) -> None:
        self._estimate = estimate

    def time(self, works: Sequence[StepWork]) -> StepTime:
        seconds = max(self._seconds(work) for work in works)
        return StepTime(seconds, seconds)

    def _seconds(self, work: StepWork) -> float:
        if not work.prefill_tokens and not work.decode_sequences:
            return 0.0
        return self._estimate.seconds(
            StepShape(work.prefill_tokens, work.decode_sequences, _attended(work))
        )


def _attended(work: StepWork) -> int:
    return work.prefill_attended + work.decode_context
