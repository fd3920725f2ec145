"""The steady state of one instance, worked out instead of simulated.

In a steady state every sequence that ends is replaced, so a step holds as much prefill as its
tokens let end: batch x tokens per step / mean output prompts. A running sequence is on average
E[L^2] / 2 E[L] tokens far (its output is likelier a long one). From that follow the batch that
memory bears, the seconds of a step, and tokens per second; nothing here is fitted.
"""

from dataclasses import dataclass

import numpy as np

from kvmesh.backends.cost.memory import MemoryPlan, plan_memory
from kvmesh.backends.cost.shapes import StepWork
from kvmesh.backends.cost.step import StepCost
from kvmesh.integration.planning.lengths import Lengths

_LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class Traffic:
    """Prompts and outputs of the requests; cached: share of a prompt's tokens found in a cache."""

    inputs: Lengths
    outputs: Lengths
    cached: float = 0.0

    @property
    def context(self) -> float:
        """Mean tokens in context of a running sequence."""
        return self.inputs.mean + self.outputs.biased


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a batch. sequences: of one rank, over all stages. step_tokens: of one step of a
    rank. accepted: mean tokens that a sequence gets per step, 1 without drafts."""

    sequences: float = float("inf")
    step_tokens: int = 8192
    accepted: float = 1.0


@dataclass(frozen=True, slots=True)
class Steady:
    """sequences: running on a rank. step_s: seconds between two tokens (or two accepted bunches)
    of a sequence. binds: what holds the batch: memory, sequences, step_tokens or load."""

    sequences: float
    step_s: float
    tpot_s: float
    output_tokens_s: float  # of the instance
    devices: int
    binds: str
    prefill_share: float  # of the step's seconds

    @property
    def tokens_s_device(self) -> float:
        return self.output_tokens_s / self.devices


class SteadyState:
    """One instance under one traffic. Raises what plan_memory raises if the model does not fit."""

    def __init__(self, cost: StepCost, traffic: Traffic, limits: Limits) -> None:
        self.cost, self.traffic, self.limits = cost, traffic, limits
        self.memory: MemoryPlan = plan_memory(
            cost.device,
            cost.model,
            cost.parallel,
            cost.formats,
            limits.step_tokens,
            mtp=cost.options.draft_tokens > 0,
        )
        self._window = cost.model.window.tokens if cost.model.window else None
        self._width = 1 + cost.options.draft_tokens

    def most(self) -> tuple[float, str]:
        """(sequences that a rank can run at once, what binds)."""
        stages, traffic = self.cost.parallel.pipeline, self.traffic
        uncached = traffic.inputs.mean * (1 - traffic.cached)
        per_token = self._width + self.limits.accepted * uncached / traffic.outputs.mean
        bounds = {
            "memory": self.memory.kv_bytes / self.memory.sequence_bytes(traffic.context),
            "sequences": self.limits.sequences,
            "step_tokens": stages * self.limits.step_tokens / per_token,
        }
        binds = min(bounds, key=lambda name: bounds[name])
        return bounds[binds], binds

    def at(self, sequences: float, binds: str = "load") -> Steady:
        """The steady state with so many sequences on each rank."""
        starts = sequences * self.limits.accepted / self.traffic.outputs.mean
        step_s = self._step_s(sequences, starts, self.traffic.context)
        alone = self._step_s(sequences, 0.0, self.traffic.context)
        parallel = self.cost.parallel
        rate = sequences * parallel.data * self.limits.accepted / step_s
        tpot = step_s / self.limits.accepted
        share = 1 - alone / step_s
        return Steady(sequences, step_s, tpot, rate, parallel.devices, binds, share)

    def full(self) -> Steady:
        """With as many sequences as the limits allow."""
        return self.at(*self.most())

    def under(self, requests_s: float) -> Steady:
        """With so many requests per second coming to the instance, as many run as that takes
        (Little's law); full() if it cannot keep up."""
        most = self.full()
        wanted = requests_s * self.traffic.outputs.mean
        if wanted >= most.output_tokens_s:
            return most
        low, high = _LEAST, most.sequences
        for _ in range(60):
            middle = (low + high) / 2
            if self.at(middle).output_tokens_s < wanted:
                low = middle
            else:
                high = middle
        return self.at(high)

    def offline(self, samples: float) -> tuple[Steady, float]:
        """(steady state, output tokens per second of the whole run) of a batch of `samples`
        requests given at once: after the last one has started, the batch runs empty."""
        full = self.full()
        outputs, ranks = self.traffic.outputs, self.cost.parallel.data
        running = min(full.sequences * ranks, samples)
        total = samples * outputs.mean
        before = max(0.0, total - running * outputs.biased) / full.output_tokens_s
        steps = np.linspace(0.0, outputs.longest, 257)
        shares, done = outputs.left(steps)
        seconds = [
            self._step_s(
                max(share * running / ranks, _LEAST), 0.0, self.traffic.inputs.mean + had + step
            )
            for share, had, step in zip(shares, done, steps, strict=True)
        ]
        drain = float(np.trapezoid(seconds, steps)) / self.limits.accepted
        return full, float(total / (before + drain))

    def loadgen(self, requests_s: float, samples: float) -> tuple[Steady, float]:
        """(steady state, output tokens per second in LoadGen's window) of `samples` requests that
        come at that rate: from the first to the end of the one that was sent last, which may be of
        any length; all tokens count, those that come later too."""
        steady = self.under(requests_s)
        served = min(requests_s, steady.output_tokens_s / self.traffic.outputs.mean)
        window = samples / served + self.traffic.outputs.grid * steady.tpot_s
        return steady, float((samples * self.traffic.outputs.mean / window).mean())

    def first_token_s(self, steady: Steady) -> float:
        """Mean seconds to the first token where decoding workers compute prompts: half a step until
        the next one begins, and the steps of the prompt's chunks. Queues are left out."""
        batch = steady.sequences / self.cost.parallel.pipeline
        chunks = self._chunks(batch)
        chunk = self._latency_s(self._work(batch, 1 / chunks, self.traffic.context))
        return steady.step_s / 2 + chunks * chunk

    def prompts(self) -> tuple[float, float]:
        """(prompts per second, seconds of one) of an instance that does nothing else; as many share
        a step as its tokens hold."""
        fresh = max(1.0, self.traffic.inputs.mean * (1 - self.traffic.cached))
        count = max(1.0, self.limits.step_tokens // fresh)
        chunks = self._chunks(0.0)
        step = self.cost.step(self._work(0.0, count / chunks, 0.0))
        return self.cost.parallel.data * count / (chunks * step.total_s), chunks * step.latency_s

    def _step_s(self, sequences: float, starts: float, context: float) -> float:
        """Mean seconds between two steps of a sequence. Its pipeline stages each hold a share of
        the sequences; starts: prompts per step of a rank that begin, over all stages."""
        stages = self.cost.parallel.pipeline
        batch, starts = sequences / stages, starts / stages
        chunks = starts * self._chunks(batch)
        if chunks <= 0 or chunks >= 1:
            return self._latency_s(self._work(batch, starts, context))
        # Fewer than one chunk per step: some steps have one, the others none.
        plain = self._latency_s(self._work(batch, 0.0, context))
        with_chunk = self._latency_s(self._work(batch, starts / chunks, context))
        return (1 - chunks) * plain + chunks * with_chunk

    def _chunks(self, batch: float) -> float:
        """Chunks of one prompt: what the decoding sequences leave of a step's tokens at a time."""
        fresh = self.traffic.inputs.mean * (1 - self.traffic.cached)
        return max(1.0, fresh / max(1.0, self.limits.step_tokens - batch * self._width))

    def _latency_s(self, work: StepWork) -> float:
        if self.cost.parallel.pipeline == 1:
            return self.cost.seconds(work)
        return self.cost.step(work).latency_s

    def _work(self, batch: float, starts: float, context: float) -> StepWork:
        inputs, cached = self.traffic.inputs, self.traffic.cached
        fresh = inputs.mean * (1 - cached)
        chunks = self._chunks(batch)  # each reads again what is before it
        attended = inputs.square * (1 - cached**2) / 2
        read = inputs.mean * cached * chunks + fresh * (chunks + 1) / 2
        windowed: tuple[float, float, float] | None = None
        if self._window is not None:
            held = min(self._window, inputs.mean)
            windowed = (fresh * held, held * chunks + fresh, min(self._window, context))
        return _work(
            (starts * fresh, starts, starts * attended, starts * read), (batch, context), windowed
        )


def _work(
    prefill: tuple[float, float, float, float],
    decode: tuple[float, float],
    windowed: tuple[float, float, float] | None,
) -> StepWork:
    """Mean work, so not of whole tokens: the cost is linear between."""
    tokens, chunks, attended, read = prefill
    batch, context = decode
    local: tuple[float | None, ...] = (None, None, None)
    if windowed is not None:
        local = (chunks * windowed[0], chunks * windowed[1], batch * windowed[2])
    return StepWork(tokens, chunks, attended, read, chunks, batch, batch * context, *local)  # type: ignore[arg-type]
