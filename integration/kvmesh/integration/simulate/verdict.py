"""Whether a simulated load kept its limits, which one binds, and what stands behind it. Pure."""

from dataclasses import dataclass

from kvmesh.integration.serve_report import Limits, Spread
from kvmesh.integration.simulate.result import PoolResult, Result

_FULL = 0.95  # of KV blocks or slots
_BUSY = 0.9


@dataclass(frozen=True, slots=True)
class Check:
    """One limit. value_s: the 99th percentile of all finished requests; of itl_s too, of gaps."""

    name: str
    value_s: float
    limit_s: float

    @property
    def met(self) -> bool:
        return self.value_s <= self.limit_s

    @property
    def used(self) -> float:
        """value over limit: the greatest one binds."""
        return self.value_s / self.limit_s if self.limit_s else float("inf")

    def __str__(self) -> str:
        sign = "<=" if self.met else ">"
        return f"{self.name} p99 {_ms(self.value_s)} {sign} {_ms(self.limit_s)}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """checks: the limits given, the one that binds first. unfinished: requests without an answer.

    cause: what the pool that is busiest had too little of.
    """

    checks: tuple[Check, ...]
    unfinished: int
    cause: str

    @property
    def met(self) -> bool:
        return not self.unfinished and all(check.met for check in self.checks)

    @property
    def binding(self) -> str:
        """One line for people."""
        if self.unfinished:
            return f"{self.unfinished} requests did not finish; {self.cause}"
        if not self.checks:
            return f"no limit was given; {self.cause}"
        return f"{self.checks[0]}; {self.cause}"


def judge(result: Result, limits: Limits) -> Verdict:
    """Of each limit the 99th percentile counts, as MLPerf has it."""
    rows: tuple[tuple[str, Spread, float | None], ...] = (
        ("TTFT", result.ttft, limits.ttft_s),
        ("TPOT", result.tpot, limits.tpot_s),
        ("ITL", result.itl, limits.itl_s),
        ("request", result.duration, limits.duration_s),
    )
    checks = [
        Check(name, spread.p99 or 0.0, limit) for name, spread, limit in rows if limit is not None
    ]
    checks.sort(key=lambda check: -check.used)
    return Verdict(tuple(checks), result.requests - result.finished, cause_of(result))


def cause_of(result: Result) -> str:
    """What the busiest pool is short of: KV memory, slots or time."""
    pool = max(result.pools, key=lambda p: (max(p.queue.waiting, default=0) > 0, p.busy))
    name = "workers" if pool.role == "both" else f"{pool.role} workers"
    waiting = max(pool.queue.waiting, default=0)
    state = f"{name} are {pool.busy:.0%} busy"
    if waiting and pool.peak_kv_share >= _FULL:
        return (
            f"{state}, KV memory is full ({pool.kv_tokens_per_rank:,} tokens per rank), "
            f"up to {waiting} requests wait"
        )
    if waiting and _most_running(pool) >= _FULL * pool.slots:
        return f"{state}, all {pool.slots:,} slots are taken, up to {waiting} requests wait"
    if pool.busy >= _BUSY or waiting:
        return f"{state}, their steps are the limit"
    return f"{state}, up to {_most_running(pool)} requests run at once"


def _most_running(pool: PoolResult) -> int:
    return max(pool.queue.running, default=0)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"
