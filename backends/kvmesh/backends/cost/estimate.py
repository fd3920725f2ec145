"""A StepCost as the linear Estimate that a router prices with."""

from collections.abc import Callable
from dataclasses import replace

from kvmesh.backends.architectures import ModelShape
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
    return fitted_estimate(lambda work: cost.step(cost.instance(work)).latency_s, cost.model)


def fitted_estimate(seconds: Callable[[StepWork], float], model: ModelShape) -> Estimate:
    """The same for steps of any clock."""
    fit = StepFit()
    for work in _steps(model):
        attended = work.prefill_attended + work.decode_context
        fit.observe(StepShape(work.prefill_tokens, work.decode_sequences, attended), seconds(work))
    return replace(fit.estimate(), simulated=True)


def _steps(model: ModelShape) -> list[StepWork]:
    window = model.window.tokens if model.window else None
    longest = model.max_context
    chunks = sorted({(min(s, longest - 1), min(n, longest)) for s in _STARTS for n in _CHUNKS})
    chunks = [(start, count) for start, count in chunks if start + count <= longest]
    contexts = sorted({min(context, longest) for context in _CONTEXTS})
    decodes = [[context] * count for context in contexts for count in _SEQUENCES]
    steps = [StepWork.of([chunk], (), window) for chunk in chunks]
    steps += [StepWork.of((), each, window) for each in decodes]
    return steps + [StepWork.of([chunks[-1]], each, window) for each in decodes]
