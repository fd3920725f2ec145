"""A simulated device's own clock, and when on it things happened to each sequence. Pure.

The clock goes forward by the simulated seconds of each step, and by nothing else: while the device
has no work, and while a real one computes the numbers, it stands still. What arrives, arrives at
the time that it shows. A transfer takes its own sequence's time and delays no step of others.
"""

from collections.abc import Iterable

from kvmesh.services.worker.limits import Planned
from kvmesh.services.worker.sequence import Sequence
from kvmesh.services.worker.timeline import SimulatedTimes, Timeline


class VirtualClock:
    """now: seconds of all steps of one simulated device."""

    def __init__(self) -> None:
        self.now = 0.0

    def arrive(self, sequence: Sequence, transfer_s: float = 0.0, num_bytes: int = 0) -> None:
        """It came, or what it waited for did; transfer_s: how long that took on the way."""
        sequence.simulated = SimulatedTimes(Timeline(self.now), transfer_s, num_bytes)

    def step(self, plan: Iterable[Planned], seconds: float) -> None:
        """A step ran. Before its results are taken: `generated` is still without them."""
        began, self.now = self.now, self.now + seconds
        for planned in plan:
            times = planned.sequence.simulated
            if times is not None:
                _step(planned, times.timeline, began, self.now)


def _step(planned: Planned, times: Timeline, began: float, ended: float) -> None:
    if times.first_step is None:
        times.first_step = began
    times.ended = ended
    if planned.want_logits:
        if times.first_token is None:
            times.first_token = ended
        times.mark(ended, planned.sequence.generated + 1)
