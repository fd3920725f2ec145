"""A simulated device's own clock, and when on it things happened to each sequence. Pure.

The clock goes forward by the simulated seconds of each step, and by nothing else: while the device
has no work, and while a real one computes the numbers, it stands still. What arrives, arrives at
the time that it shows. A transfer takes its own sequence's time and delays no step of others.
"""

from collections.abc import Iterable

from kvmesh.services.worker.limits import Planned
from kvmesh.services.worker.sequence import Sequence
from kvmesh.services.worker.timeline import SimulatedTimes, Timeline, TransferTime


class VirtualClock:
    """now: seconds of all steps of one simulated device. transfer: of KV to it."""

    def __init__(self, transfer: TransferTime) -> None:
        self.now = 0.0
        self._transfer = transfer

    def arrive(self, sequence: Sequence, num_bytes: int = 0) -> None:
        """It came, or the bytes of KV that it waited for did."""
        seconds = self._transfer.joined(sequence.work.source).seconds(num_bytes)
        sequence.simulated = SimulatedTimes(Timeline(self.now), seconds, num_bytes)

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
