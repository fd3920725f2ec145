"""What `kvmesh top` shows, from two looks at a mesh. Pure.

A look is the router's status, which every client may ask for, and the metrics of the members whose
endpoints could be read. What is not known is None, never zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.integration.scrape import NOTHING, Samples, grown, grown_buckets, quantile
from kvmesh.services.common import metric_names as metric
from kvmesh.v1 import inference_pb2

FIRST_TOKEN = metric.TIME_TO_FIRST_TOKEN.replace(".", "_") + "_seconds"
PER_TOKEN = metric.TIME_PER_OUTPUT_TOKEN.replace(".", "_") + "_seconds"
DURATION = metric.REQUEST_DURATION.replace(".", "_") + "_seconds"
USAGE_SUM = metric.TOKEN_USAGE.replace(".", "_") + "_sum"
TOKEN_TYPE = metric.TOKEN_TYPE.replace(".", "_")
CLOCK = "kvmesh_clock"
ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Look:
    """A mesh at one time. at: seconds on any clock that does not run backwards."""

    at: float
    status: inference_pb2.MeshStatusResponse
    samples: Mapping[str, Samples] = field(default_factory=dict)

    def of(self, member_id: str) -> Samples:
        return self.samples.get(member_id, NOTHING)


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of `count` requests."""

    p50_s: float
    p99_s: float
    count: int


@dataclass(frozen=True, slots=True)
class Served:
    """Requests of one clock, measured or simulated, which are never summed with the other's."""

    clock: str
    ttft: Latency | None
    tpot: Latency | None
    usd_per_million_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """batch: mean sequences per step."""

    member_id: str
    role: str
    state: str
    device: str
    simulated: bool
    running: int
    waiting: int
    batch: float | None
    output_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    blocks_used: int
    blocks_total: int
    preemptions: int | None
    checksum_failures: int | None


@dataclass(frozen=True, slots=True)
class ShardRow:
    """hit_rate: blocks found by blocks asked for."""

    member_id: str
    state: str
    blocks: int | None
    bytes_used: int | None
    bytes_budget: int | None
    hit_rate: float | None
    in_bytes_per_s: float | None
    out_bytes_per_s: float | None
    evictions: int | None
    checksum_failures: int | None


@dataclass(frozen=True, slots=True)
class MeshView:
    """window_s: seconds that latencies, hit rate and price are of; rate_s: that rates are of."""

    uptime_s: float
    window_s: float
    rate_s: float
    requests_active: int
    requests_total: int
    rejected_total: int
    migrations_total: int
    waiting: int
    requests_per_s: float | None
    output_tokens_per_s: float | None
    prefill_tokens_per_s: float | None
    hit_rate: float | None
    served: tuple[Served, ...]
    workers: tuple[WorkerRow, ...]
    shards: tuple[ShardRow, ...]
    unread: tuple[str, ...]  # members whose metrics could not be read


@dataclass(frozen=True, slots=True)
class _Span:
    """From one look, or the start of the mesh, to another."""

    before: Look | None
    now: Look

    @property
    def seconds(self) -> float:
        if self.before is None:
            return self.now.status.uptime_s
        return self.now.at - self.before.at

    def grown(self, member_id: str, name: str, **labels: str) -> float | None:
        """None if the metric is not there now."""
        now = self.now.of(member_id).total(name, **labels)
        if now is None:
            return None
        before = self.before.of(member_id) if self.before is not None else NOTHING
        return grown(before.total(name, **labels), now)

    def rate(self, member_id: str, name: str, **labels: str) -> float | None:
        """Per second; None if it is not known, or no time has passed."""
        count = self.grown(member_id, name, **labels)
        return count / self.seconds if count is not None and self.seconds > 0 else None

    def latency(self, name: str, **labels: str) -> Latency | None:
        now = self.now.of(ROUTER).buckets(name, **labels)
        before = self.before.of(ROUTER).buckets(name, **labels) if self.before is not None else {}
        buckets = grown_buckets(before, now)
        p50, p99 = quantile(buckets, 0.5), quantile(buckets, 0.99)
        if p50 is None or p99 is None:
            return None
        return Latency(p50, p99, round(max(buckets.values())))


def mesh_view(
    now: Look, window_from: Look | None = None, rate_from: Look | None = None
) -> MeshView:
    """The mesh as `now` shows it; what is counted over time since the other looks.

    Without them: since the start of the mesh.
    """
    status = now.status
    window, rates = _Span(window_from, now), _Span(rate_from, now)
    workers = tuple(_worker(m, rates) for m in status.members if m.kind == "worker")
    shards = tuple(_shard(m, window, rates) for m in status.members if m.kind == "kvcache")
    return MeshView(
        uptime_s=status.uptime_s,
        window_s=window.seconds,
        rate_s=rates.seconds,
        requests_active=status.requests_active,
        requests_total=status.requests_total,
        rejected_total=status.rejected_total,
        migrations_total=status.migrations_total,
        waiting=sum(worker.waiting for worker in workers),
        requests_per_s=rates.rate(ROUTER, f"{DURATION}_count"),
        output_tokens_per_s=_sum([w.output_tokens_per_s for w in workers]),
        prefill_tokens_per_s=_sum([w.prefill_tokens_per_s for w in workers]),
        hit_rate=_share(
            window.grown(ROUTER, "kvmesh_cache_hit_tokens_total"),
            window.grown(ROUTER, "kvmesh_cache_query_tokens_total"),
        ),
        served=_served(window),
        workers=workers,
        shards=shards,
        unread=tuple(m.member_id for m in status.members if m.member_id not in now.samples),
    )


def _served(window: _Span) -> tuple[Served, ...]:
    clocks = window.now.of(ROUTER).label_values(f"{FIRST_TOKEN}_count", CLOCK)
    return tuple(
        Served(
            clock,
            window.latency(FIRST_TOKEN, **{CLOCK: clock}),
            window.latency(PER_TOKEN, **{CLOCK: clock}),
            _price(window, clock),
        )
        for clock in sorted(clocks)
    )


def _price(window: _Span, clock: str) -> float | None:
    """Dollars for a million output tokens of a clock; None as long as no price is known."""
    dollars = window.grown(ROUTER, "kvmesh_cost_total", **{CLOCK: clock})
    tokens = window.grown(ROUTER, USAGE_SUM, **{TOKEN_TYPE: "output", CLOCK: clock})
    share = _share(dollars, tokens)
    return share * 1e6 if share else None


def _worker(member: inference_pb2.MemberStatus, rates: _Span) -> WorkerRow:
    name = member.member_id
    steps = rates.grown(name, "kvmesh_worker_steps_total")
    samples = rates.now.of(name)
    return WorkerRow(
        member_id=name,
        role=member.role,
        state=member.state,
        device=member.device,
        simulated=member.simulated,
        running=member.running,
        waiting=member.waiting,
        batch=_share(rates.grown(name, "kvmesh_worker_steps_sequences_total"), steps),
        output_tokens_per_s=rates.rate(name, "kvmesh_worker_tokens_generated_total"),
        prefill_tokens_per_s=rates.rate(name, "kvmesh_worker_tokens_prefilled_total"),
        blocks_used=member.blocks_total - member.blocks_free,
        blocks_total=member.blocks_total,
        preemptions=_whole(samples.total("kvmesh_worker_preemptions_total")),
        checksum_failures=_whole(samples.total("kvmesh_kv_checksum_failures_total")),
    )


def _shard(member: inference_pb2.MemberStatus, window: _Span, rates: _Span) -> ShardRow:
    name = member.member_id
    samples = rates.now.of(name)
    hits = window.grown(name, "kvmesh_kvcache_hits_total")
    misses = window.grown(name, "kvmesh_kvcache_misses_total")
    moved = "kvmesh_kv_moved_bytes_total"
    return ShardRow(
        member_id=name,
        state=member.state,
        blocks=_whole(samples.total("kvmesh_kvcache_blocks")),
        bytes_used=_whole(samples.total("kvmesh_kvcache_used_bytes")),
        bytes_budget=_whole(samples.total("kvmesh_kvcache_budget_bytes")),
        hit_rate=_share(hits, None if hits is None or misses is None else hits + misses),
        in_bytes_per_s=rates.rate(name, moved, kvmesh_kv_direction="in"),
        out_bytes_per_s=rates.rate(name, moved, kvmesh_kv_direction="out"),
        evictions=_whole(samples.total("kvmesh_kvcache_evictions_total")),
        checksum_failures=_whole(samples.total("kvmesh_kv_checksum_failures_total")),
    )


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _whole(value: float | None) -> int | None:
    return round(value) if value is not None else None
