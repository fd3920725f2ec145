"""A StepCost as the linear Estimate that a router prices with."""

from dataclasses import replace

from kvmesh.backends.base import Estimate, StepShape
from kvmesh.backends.cost.fit import StepFit
from kvmesh.backends.cost.shapes import StepWork
from kvmesh.backends.cost.step import StepCost

_CHUNKS = (1, 16, 64, 256, 1024, 4096)
_STARTS = (0, 2048, 16384)
_SEQUENCES = (1, 4, 16, 64, 256)
_CONTEXTS = (128, 1024, 8192, 32768)


def linear_estimate(cost: StepCost) -> Estimate:
    """The non-negative fit of least relative error over prefill, decode and mixed steps of an
    instance; contexts are cut at the model's longest. Marked simulated."""
    fit = StepFit()
    for work in _steps(cost):
        attended = work.prefill_attended + work.decode_context
        shape = StepShape(work.prefill_tokens, work.decode_sequences, attended)
        fit.observe(shape, cost.step(cost.instance(work)).latency_s)
    return replace(fit.estimate(), simulated=True)


def _steps(cost: StepCost) -> list[StepWork]:
    window = cost.model.window.tokens if cost.model.window else None
    longest = cost.model.max_context
    chunks = sorted({(min(s, longest - 1), min(n, longest)) for s in _STARTS for n in _CHUNKS})
    chunks = [(start, count) for start, count in chunks if start + count <= longest]
    contexts = sorted({min(context, longest) for context in _CONTEXTS})
    decodes = [[context] * count for context in contexts for count in _SEQUENCES]
    steps = [StepWork.of([chunk], (), window) for chunk in chunks]
    steps += [StepWork.of((), each, window) for each in decodes]
    return steps + [StepWork.of([chunks[-1]], each, window) for each in decodes]
