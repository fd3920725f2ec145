"""What the router records of each request, once, when it has ended."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from kvmesh.services.common import metric_names as metric
from kvmesh.services.common import names
from kvmesh.services.common.metrics import Meters
from kvmesh.services.router.bill import MEASURED, SIMULATED, device_seconds, dollars, split_of
from kvmesh.services.router.core import Decision
from kvmesh.v1 import inference_pb2

# The conventions' own boundaries, and finer ones below and between: a small model is fast.
DURATION_S = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
PER_TOKEN_S = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1,
    0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)  # fmt: skip
TOKENS = tuple(4**power for power in range(14))


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """One request that is over.

    operation: chat or text_completion. model: the mesh's, empty if it was refused before one was
    found. error: class of what ended it, empty if it finished. duration_s: by the wall clock.
    """

    operation: str
    model: str
    usage: inference_pb2.Usage
    duration_s: float
    error: str


@dataclass(slots=True)
class RouterCounts:
    """Since the process started. decisions: by (kind, worker that generates)."""

    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cost_usd: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by clock
    device_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class RequestMetrics:
    """The GenAI histograms, and sums over requests."""

    def __init__(self, meters: Meters) -> None:
        self.counts = RouterCounts()
        self._duration = meters.histogram(
            metric.REQUEST_DURATION, "s", "From a request's arrival to its last token.", DURATION_S
        )
        self._first = meters.histogram(
            metric.TIME_TO_FIRST_TOKEN, "s", "From arrival to the first token.", FIRST_TOKEN_S
        )
        self._per_token = meters.histogram(
            metric.TIME_PER_OUTPUT_TOKEN, "s", "Per output token after the first.", PER_TOKEN_S
        )
        self._tokens = meters.histogram(
            metric.TOKEN_USAGE, "{token}", "Tokens of a prompt, or of an output.", TOKENS
        )

    def decided(self, decision: Decision) -> None:
        """A request, not a mere question, was placed."""
        chosen = decision.chosen
        kind, worker = "none", ""
        if chosen is not None:
            kind = "handover" if chosen.prefill_worker else "single"
            worker = chosen.decode_worker
        self.counts.decisions[kind, worker] += 1

    def ended(self, end: RequestEnd) -> None:
        labels = {
            names.OPERATION: end.operation,
            names.PROVIDER: "kvmesh",
            names.REQUEST_MODEL: end.model,
            names.CLOCK: end.usage.cost_kind or MEASURED,
        }
        self._bill(end.usage)
        duration_s, first_s = _latencies(end)
        if end.error:
            labels[metric.ERROR_TYPE] = end.error
            self._duration.record(duration_s, labels)
            return
        usage, counts = end.usage, self.counts
        self._duration.record(duration_s, labels)
        self._first.record(first_s, labels)
        if usage.completion_tokens > 1:
            simulated = usage.cost_kind == SIMULATED
            after_first_s = (duration_s if simulated else usage.duration_s) - first_s
            self._per_token.record(after_first_s / (usage.completion_tokens - 1), labels)
        self._tokens.record(usage.prompt_tokens, {**labels, metric.TOKEN_TYPE: "input"})
        self._tokens.record(usage.completion_tokens, {**labels, metric.TOKEN_TYPE: "output"})
        counts.prompt_tokens += usage.prompt_tokens
        counts.cached_tokens += usage.cached_tokens

    def _bill(self, usage: inference_pb2.Usage) -> None:
        """Of failed requests too: their device time is spent. Each stay counts by its own clock."""
        for stay in usage.devices:
            clock = SIMULATED if stay.simulated else MEASURED
            self.counts.device_s[clock] += device_seconds(stay)
            self.counts.cost_usd[clock] += dollars(split_of([stay]))


def _latencies(end: RequestEnd) -> tuple[float, float]:
    """(duration, TTFT) in seconds, by the clock that the request's labels name."""
    if end.usage.cost_kind == SIMULATED:
        return end.usage.simulated_duration_s, end.usage.simulated_ttft_s
    return end.duration_s, end.usage.ttft_s
