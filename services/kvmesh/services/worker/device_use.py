"""Whose a device's time is: each step is shared out over its sequences. Pure.

A sequence's share of a step goes by the device's own estimate: an even part of what a step takes
whatever is in it, and what its tokens and the context that they attend to add. The shares are
scaled so that they add up to the step's seconds exactly. On a measured device the time between two
steps is shared out too, over those that wait in it; on a simulated one the gap is in the step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvmesh.backends.base import Estimate, StepTimes


@dataclass(slots=True)
class DeviceUse:
    """Seconds of a device that a sequence has taken; see kvmesh.v1.CostSplit for the parts."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.decode_s + self.kv_s


class StepPart(NamedTuple):
    """What a step did for one sequence: it ran `tokens` tokens from position `start` on.

    prefill: it has said no token here yet. sealed: blocks that it filled.
    """

    start: int
    tokens: int
    prefill: bool
    sealed: int = 0


class StepShare(NamedTuple):
    """One sequence's seconds of a step."""

    idle_s: float
    compute_s: float
    kv_s: float


def split_step(parts: Sequence[StepPart], times: StepTimes, estimate: Estimate) -> list[StepShare]:
    """One for each part; all of them add up to the step's time on the device that is priced."""
    simulated = times.simulated_s
    total_s = times.total_s if simulated is None else simulated
    idle_s = 0.0 if simulated is None else min(times.simulated_idle_s, total_s)
    sealed = sum(part.sealed for part in parts)
    seal_s = min(times.seal_s, total_s) if sealed and simulated is None else 0.0
    whole, attending = _weights(parts, estimate)
    scale = (total_s - idle_s - seal_s) / sum(whole)
    each_idle_s, each_seal_s = idle_s / len(parts), seal_s / max(1, sealed)
    return [
        StepShare(each_idle_s, (weight - kv) * scale, kv * scale + each_seal_s * part.sealed)
        for part, weight, kv in zip(parts, whole, attending, strict=True)
    ]


def _weights(parts: Sequence[StepPart], estimate: Estimate) -> tuple[list[float], list[float]]:
    """(whole, attending) of each part; by tokens if the estimate gives all of them nothing."""
    base, prefill = estimate.base_s / len(parts), estimate.prefill_token_s
    decode, context = estimate.decode_token_s, estimate.context_token_s
    whole, attending = [], []
    for start, count, _, _ in parts:
        # Each token attends to all before it and to itself.
        kv = context * (count * start + count * (count + 1) // 2)
        attending.append(kv)
        whole.append(base + (prefill * count if count > 1 else decode) + kv)
    if sum(whole) > 0:
        return whole, attending
    return [float(part.tokens) for part in parts], [0.0] * len(parts)


def split_gap(waiting_since: Sequence[float], free_since: float, now: float) -> list[float]:
    """Seconds of an idle device for each of those that waited, by how long each did.

    waiting_since: at least one. They add up to the time in which it was free and any waited.
    """
    waited = [now - max(free_since, since) for since in waiting_since]
    total = sum(waited)
    scale = max(waited) / total if total > 0 else 0.0
    return [each * scale for each in waited]


class Metered(Protocol):
    """What a meter charges: a sequence. waiting_since: when it came, on the meter's clock."""

    @property
    def use(self) -> DeviceUse: ...

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
            each.use.queue_s += seconds
        self.busy_s += sum(gaps)

    def end(
        self,
        parts: Sequence[tuple[Metered, StepPart]],
        times: StepTimes,
        estimate: Estimate,
        now: float,
    ) -> None:
        """The step is over, with what it did for each."""
        shares = split_step([part for _, part in parts], times, estimate)
        for (each, part), (idle_s, compute_s, kv_s) in zip(parts, shares, strict=True):
            use = each.use
            use.queue_s += idle_s
            use.kv_s += kv_s
            if part.prefill:
                use.prefill_s += compute_s
            else:
                use.decode_s += compute_s
            self.busy_s += idle_s + compute_s + kv_s
        self._free_since = now

    def failed(self, now: float) -> None:
        """The step came to nothing: nobody is charged for it."""
        self._free_since = now
