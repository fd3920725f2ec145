"""When things happened to one sequence. Pure."""

from dataclasses import dataclass, field

MAX_MARKS = 32  # sampled times of a decode, for its span


@dataclass(slots=True)
class Timeline:
    """When things happened, on the scheduler's clock; None: not yet.

    marks: (time, output tokens so far, longest wait for one token since the mark before in
        seconds), at most 32, evenly thinned out: a stall shows, however long the output.
    """

    received: float
    admitted: float | None = None
    first_step: float | None = None
    first_token: float | None = None
    ended: float | None = None
    marks: list[tuple[float, int, float]] = field(default_factory=list)
    mark_every: int = 1
    last_token: float | None = None
    longest_s: float = 0.0

    def mark(self, now: float, count: int) -> None:
        if self.last_token is not None:
            self.longest_s = max(self.longest_s, now - self.last_token)
        self.last_token = now
        if count % self.mark_every:
            return
        self.marks.append((now, count, self.longest_s))
        self.longest_s = 0.0
        if len(self.marks) == MAX_MARKS:
            pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
            self.marks = [(at, n, max(longest, gone[2])) for gone, (at, n, longest) in pairs]
            self.mark_every *= 2


@dataclass(frozen=True, slots=True)
class SimulatedTrace:
    """The trace that a request has by its simulated devices' clocks.

    parent: W3C context of its root. start_ns: Unix time there of the stay on this worker.
    """

    parent: tuple[tuple[str, str], ...]
    start_ns: int


@dataclass(frozen=True, slots=True)
class TransferTime:
    """Seconds to move KV from one simulated device: once, and for each byte."""

    base_s: float = 0.0
    byte_s: float = 0.0

    def seconds(self, num_bytes: int) -> float:
        return self.base_s + self.byte_s * num_bytes if num_bytes else 0.0

    def joined(self, other: "TransferTime") -> "TransferTime":
        """Between two devices: the slower of both sets the pace."""
        return TransferTime(max(self.base_s, other.base_s), max(self.byte_s, other.byte_s))


@dataclass(slots=True)
class SimulatedTimes:
    """A sequence by its simulated device's clock, which is not that of any other timeline.

    transfer_s, transfer_bytes: of blocks and tail that came to the device, before the timeline.
    """

    timeline: Timeline
    transfer_s: float = 0.0
    transfer_bytes: int = 0

    @property
    def elapsed_s(self) -> float:
        """From its receipt to the end of its last step."""
        return self.at(self.timeline.ended)

    def at(self, time: float | None) -> float:
        """Seconds from its receipt to a time of the timeline; to its begin if that has not come."""
        received = self.timeline.received
        return self.transfer_s + ((received if time is None else time) - received)
