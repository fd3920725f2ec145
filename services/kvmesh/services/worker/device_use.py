"""Whose a device's time is: each step is shared out over its sequences. Pure.

A sequence's share of a step goes by the device's own estimate: an even part of what a step takes
whatever is in it, and what its tokens and the context that they attend to add. The shares are
scaled so that they add up to the step's seconds exactly. On a measured device the time between two
steps is shared out too, over those that wait in it; on a simulated one the gap is in the step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmesh.backends.base import Estimate, StepTimes


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Seconds of a device that a sequence has taken; see kvmesh.v1.CostSplit for the parts."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.decode_s + self.kv_s

    def __add__(self, other: "DeviceUse") -> "DeviceUse":
        return DeviceUse(
            self.queue_s + other.queue_s,
            self.prefill_s + other.prefill_s,
            self.decode_s + other.decode_s,
            self.kv_s + other.kv_s,
        )


@dataclass(frozen=True, slots=True)
class StepPart:
    """What a step did for one sequence: tokens [start, start + count).

    prefill: it has said no token here yet. sealed: blocks that it filled.
    """

    start: int
    count: int
    prefill: bool
    sealed: int = 0

    @property
    def context(self) -> int:
        """Sum over its tokens of the tokens that each attends to, itself included."""
        return self.count * self.start + self.count * (self.count + 1) // 2


def split_step(parts: Sequence[StepPart], times: StepTimes, estimate: Estimate) -> list[DeviceUse]:
    """One for each part; their total_s add up to the step's time on the device that is priced."""
    simulated = times.simulated_s is not None
    total_s = times.total_s if times.simulated_s is None else times.simulated_s
    idle_s = min(times.simulated_idle_s, total_s) if simulated else 0.0
    sealed = sum(part.sealed for part in parts)
    seal_s = min(times.seal_s, total_s) if sealed and not simulated else 0.0
    whole, kv = _weights(parts, estimate)
    scale = (total_s - idle_s - seal_s) / sum(whole)
    return [
        _use(
            part,
            idle_s / len(parts),
            (weight - attending) * scale,
            attending * scale + (seal_s * part.sealed / sealed if sealed else 0.0),
        )
        for part, weight, attending in zip(parts, whole, kv, strict=True)
    ]


def _use(part: StepPart, idle_s: float, compute_s: float, kv_s: float) -> DeviceUse:
    if part.prefill:
        return DeviceUse(queue_s=idle_s, prefill_s=compute_s, kv_s=kv_s)
    return DeviceUse(queue_s=idle_s, decode_s=compute_s, kv_s=kv_s)


def _weights(parts: Sequence[StepPart], estimate: Estimate) -> tuple[list[float], list[float]]:
    """(whole, attending) of each part; by tokens if the estimate gives all of them nothing."""
    attending = [estimate.context_token_s * part.context for part in parts]
    whole = [
        estimate.base_s / len(parts)
        + (estimate.prefill_token_s if part.count > 1 else estimate.decode_token_s) * part.count
        + kv
        for part, kv in zip(parts, attending, strict=True)
    ]
    if sum(whole) > 0:
        return whole, attending
    return [float(part.count) for part in parts], [0.0] * len(parts)


def split_gap(waiting_since: Sequence[float], free_since: float, now: float) -> list[float]:
    """Seconds of an idle device for each of those that waited, by how long each did.

    waiting_since: at least one. They add up to the time in which it was free and any waited.
    """
    waited = [now - max(free_since, since) for since in waiting_since]
    gap_s, total = max(waited), sum(waited)
    return [gap_s * each / total if total > 0 else 0.0 for each in waited]


class Metered(Protocol):
    """What a meter charges: a sequence. waiting_since: when it came, on the meter's clock."""

    use: DeviceUse

    @property
    def waiting_since(self) -> float: ...


class DeviceMeter:
    """Charges steps, and the time between them, to sequences. `now`: seconds, monotonic.

    busy_s: all that it has charged so far.
    """

    def __init__(self, simulated: bool, now: float) -> None:
        self._simulated = simulated
        self._free_since = now
        self.busy_s = 0.0

    def begin(self, active: Iterable[Metered], now: float) -> None:
        """A step begins; `active` wait, those that it runs included."""
        waiting = list(active)
        if self._simulated or not waiting:
            return
        gaps = split_gap([each.waiting_since for each in waiting], self._free_since, now)
        for each, seconds in zip(waiting, gaps, strict=True):
            self._charge(each, DeviceUse(queue_s=seconds))

    def end(
        self,
        parts: Sequence[tuple[Metered, StepPart]],
        times: StepTimes,
        estimate: Estimate,
        now: float,
    ) -> None:
        """The step is over, with what it did for each."""
        uses = split_step([part for _, part in parts], times, estimate)
        for (each, _), use in zip(parts, uses, strict=True):
            self._charge(each, use)
        self._free_since = now

    def failed(self, now: float) -> None:
        """The step came to nothing: nobody is charged for it."""
        self._free_since = now

    def _charge(self, each: Metered, use: DeviceUse) -> None:
        each.use += use
        self.busy_s += use.total_s
