"""How long a worker's rounds take: a step, and all that its loop does before the next one. Pure.

The device's own estimate ends with the forward. Sampling, taking results, copying blocks out and
waiting for the interpreter's lock, which the RPCs of the same process hold, come on top of it, and
on a small model they are a good part of the time between two tokens.
"""

from collections.abc import Sequence

from kvmesh.backends.base import Estimate, StepShape
from kvmesh.backends.cost.fit import StepFit
from kvmesh.services.worker.limits import Planned

_KEPT_STEPS = 16  # of each kind


class Pace:
    """Learns an Estimate of whole rounds. `now`: seconds, monotonic.

    prior: the device's own estimate. A round that waited for work counts from when it came.
    """

    def __init__(self, prior: Estimate, now: float) -> None:
        self._fit = StepFit(prior, kept=_KEPT_STEPS, mean=True)
        self._since = now

    def woke(self, now: float) -> None:
        """There was nothing to do until now."""
        self._since = now

    def stepped(self, plan: Sequence[Planned], now: float) -> None:
        """The round of a step is over."""
        shape = StepShape.of((step.start, step.count, step.want_logits) for step in plan)
        self._fit.observe(shape, now - self._since)
        self._since = now

    def estimate(self) -> Estimate:
        return self._fit.estimate()
