"""What is noted while the mesh runs: each request's times, gaps between tokens, queues."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvmesh.integration.simulate.arrivals import SimRequest

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class RequestRecord:
    """One request; times are simulated seconds from the start of the load, None: not reached.

    sent_s: when it came to its first worker. admitted_s: when it got its place in a batch.
    first_step_s: when its first step began. first_token_s, end_s: as the client sees them.
    transfer_s: (begin, end) of handing its K and V over. device_s: device seconds that its worker's
    steps took, shared out by tokens among those in the step. error: why it ended without finishing.
    """

    request: SimRequest
    arrival_s: float
    sent_s: float | None = None
    admitted_s: float | None = None
    first_step_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    end_s: float | None = None
    transfer: tuple[float, float] | None = None
    cached_tokens: int = 0
    output_tokens: int = 0
    longest_gap_s: float = 0.0
    prefill_worker: str = ""
    decode_worker: str = ""
    migrations: int = 0
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.end_s is not None and not self.error

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Per output token after the first; None for an output of one."""
        if self.output_tokens < 2 or self.first_token_s is None or self.last_token_s is None:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def duration_s(self) -> float | None:
        return None if self.end_s is None else self.end_s - self.arrival_s


@dataclass(slots=True)
class Gaps:
    """Seconds between tokens of one request, and how often each was seen."""

    single: list[float] = field(default_factory=list)
    runs: list[tuple[float, float, int, int]] = field(default_factory=list)

    def add_run(self, first_s: float, rise_s: float, steps: int, sequences: int) -> None:
        """`sequences` sequences each waited first_s, first_s + rise_s, ... for `steps` tokens."""
        self.runs.append((first_s, rise_s, steps, sequences))

    def weighted(self) -> tuple[Floats, Floats]:
        """(seconds, weight), ascending in seconds."""
        values: list[Floats] = [np.asarray(self.single, np.float64)]
        weights: list[Floats] = [np.ones(len(self.single))]
        for first, rise, steps, sequences in self.runs:
            values.append(first + rise * np.arange(steps, dtype=np.float64))
            weights.append(np.full(steps, float(sequences)))
        seconds, counts = np.concatenate(values), np.concatenate(weights)
        order = np.argsort(seconds, kind="stable")
        return seconds[order], counts[order]


@dataclass(slots=True)
class QueueTrack:
    """Changes of what waits and runs in one pool of workers."""

    at: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    kv_share: list[float] = field(default_factory=list)

    def sampled(self, times: Sequence[float]) -> "QueueTrack":
        """What held at each of `times`, ascending; nothing was there before the first change."""
        places = np.searchsorted(self.at, times, side="right") - 1
        known = [int(i) for i in places]
        return QueueTrack(
            list(times),
            [self.waiting[i] if i >= 0 else 0 for i in known],
            [self.running[i] if i >= 0 else 0 for i in known],
            [self.kv_share[i] if i >= 0 else 0.0 for i in known],
        )


@dataclass(slots=True)
class Emitted:
    """Output tokens over time: in each span so many, evenly."""

    start: list[float] = field(default_factory=list)
    end: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, start: float, end: float, tokens: int) -> None:
        self.start.append(start)
        self.end.append(end)
        self.tokens.append(tokens)
