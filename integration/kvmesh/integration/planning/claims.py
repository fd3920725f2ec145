"""Published claims beside what a waterfall measured. They are shown, never multiplied in.

Each says what it is of, so that nobody takes it for a factor on another workload.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.integration.planning.choice import Choice
from kvmesh.integration.planning.compare import Question
from kvmesh.integration.planning.evaluate import Goals, Point, evaluate


@dataclass(frozen=True, slots=True)
class Claim:
    """factor: as published. of: the optimisation or device step that it is about; all: of the whole
    stack. tag: M measured, C claimed, X derived."""

    of: str
    factor: float
    tag: str
    what: str


CLAIMS = (
    Claim("kv", 6.0, "C", "bytes of a KV codec against 16 bit, not time; at most 3 against fp8"),
    Claim("all", 1.54, "M", "DeepSeek-R1 Offline, same GB300s, MLPerf v5.1 to v6.0"),
    Claim("all", 2.7, "M", "DeepSeek-R1 Server, one cell of MLPerf, v5.1 to v6.0"),
    Claim("hardware", 1.74, "M", "DeepSeek-R1 Offline, Rubin against GB300 in MLPerf v6.1"),
    Claim("hardware", 10.0, "C", "cost per token of Vera Rubin NVL72, 'up to', one model, 32K/8K"),
    Claim("hardware", 35.0, "C", "Vera Rubin with LPX against GB200, at about 400 tok/s per user"),
)


def of(name: str) -> tuple[Claim, ...]:
    return tuple(claim for claim in CLAIMS if claim.of == name)


def ratio_at(old: Sequence[Point], new: Sequence[Point], user_tokens_s: float) -> float | None:
    """Throughput of a device, new over old, at this speed of a user; None if the new one does not
    reach it, infinity if only the old one does not. Both: frontiers."""
    a, b = _at(old, user_tokens_s), _at(new, user_tokens_s)
    if b is None:
        return None
    return float("inf") if a is None else b / a


def where(old: Sequence[Point], new: Sequence[Point], factor: float) -> float | None:
    """The slowest user's speed at which a device gives `factor` times as much; None if at none
    that both reach."""
    speeds = sorted({point.user_tokens_s for point in (*old, *new)})
    for speed in speeds:
        ratio = ratio_at(old, new, speed)
        if ratio is not None and factor <= ratio < float("inf"):
            return speed
    return None


@dataclass(frozen=True, slots=True)
class Axis:
    """Where on the axis of a user's speed a hardware claim would hold: at_user_tokens_s, None if
    nowhere; most: the largest ratio anywhere that both devices reach, and old_reaches, how fast a
    user the old one can serve at all."""

    claim: Claim
    at_user_tokens_s: float | None
    most: float
    old_reaches: float


def hardware_axis(question: Question, old: Choice, new: Choice) -> list[Axis]:
    """For each hardware claim; by the steady state, both with the layouts that serve best."""
    before = evaluate(old, question.model, question.traffic, Goals()).frontier
    after = evaluate(new, question.model, question.traffic, Goals()).frontier
    speeds = sorted({point.user_tokens_s for point in (*before, *after)})
    ratios = [ratio_at(before, after, speed) for speed in speeds]
    most = max((r for r in ratios if r is not None and r < float("inf")), default=0.0)
    reaches = max(point.user_tokens_s for point in before)
    return [
        Axis(claim, where(before, after, claim.factor), most, reaches) for claim in of("hardware")
    ]


def _at(frontier: Sequence[Point], user_tokens_s: float) -> float | None:
    """The best throughput of a device whose users get at least this speed."""
    fast = [p.output_tokens_s for p in frontier if p.user_tokens_s >= user_tokens_s]
    return max(fast, default=None)
