"""What the router shows of itself and of the whole mesh: read when somebody scrapes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from kvmesh.services.common import metric_names as metric
from kvmesh.services.common import names
from kvmesh.services.common.metrics import Meters, Metric, Point, cache_config
from kvmesh.services.router.limits import TenantLimits, TenantState
from kvmesh.services.router.parts import RouterParts
from kvmesh.services.router.request_metrics import RouterCounts
from kvmesh.services.router.workers import WorkerState

MAX_TENANTS = 100  # with a label of their own; the rest are one
OTHER_TENANTS = "_other"


def show_router(meters: Meters, parts: RouterParts) -> None:
    """Makes the router's metrics, which read `parts` whenever they are scraped."""
    admission, index, counts = parts.admission, parts.core.index, parts.metrics.counts
    meters.gauges(
        [
            Metric(metric.ROUTER_ACTIVE, "{request}", "In the mesh now.", lambda: admission.active),
            Metric(metric.ROUTER_INDEX_BYTES, "By", "Prefix index.", lambda: index.num_bytes),
            Metric(metric.ROUTER_INDEX_BLOCKS, "{block}", "In the index.", lambda: index.entries),
            Metric(metric.ROUTER_MEMBERS, "{member}", "By kind.", lambda: _members(parts)),
        ]
    )
    meters.counters(
        [
            Metric(
                metric.ROUTER_REJECTED, "{request}", "Refused as one too many.",
                lambda: admission.rejected,
            ),
            Metric(
                metric.ROUTER_DECISIONS, "{decision}", "Where requests were sent.",
                lambda: _decisions(counts),
            ),
            Metric(
                metric.ROUTER_MIGRATIONS, "{migration}", "Moves away from a worker that died.",
                lambda: parts.migrations,
            ),
        ]
    )  # fmt: skip
    _show_requests(meters, counts)
    _show_vllm(meters, parts, counts)
    _show_tenants(meters, parts.limits)


def _show_requests(meters: Meters, counts: RouterCounts) -> None:
    """Sums over finished requests. What nobody reported is absent, not zero."""
    meters.counters(
        [
            Metric(
                metric.CACHE_QUERY_TOKENS, "{token}", "Prompt tokens of finished requests.",
                lambda: counts.prompt_tokens,
            ),
            Metric(
                metric.CACHE_HIT_TOKENS, "{token}", "Of those, found in the cache.",
                lambda: counts.cached_tokens,
            ),
            Metric(
                metric.COST, "{USD}", "Price of the device time of requests that have ended.",
                lambda: _by_clock(counts.cost_usd),
            ),
            Metric(
                metric.DEVICE_TIME, "s", "Device seconds of requests that have ended.",
                lambda: _by_clock(counts.device_s),
            ),
        ]
    )  # fmt: skip


def _show_tenants(meters: Meters, limits: TenantLimits) -> None:
    """Nothing without tenants; the first MAX_TENANTS that came have a label each."""

    def by_tenant(read: Callable[[TenantState], Mapping[str, int]]) -> list[Point]:
        sums: Counter[tuple[str, str]] = Counter()
        for place, (name, state) in enumerate(list(limits.states.items())):
            label = name if place < MAX_TENANTS else OTHER_TENANTS
            for kind, value in list(read(state).items()):
                sums[label, kind] += value
        return [
            (value, {names.TENANT: label, **({metric.LIMIT_KIND: kind} if kind else {})})
            for (label, kind), value in sums.items()
        ]

    meters.gauges(
        [
            Metric(
                metric.TENANT_ACTIVE, "{request}", "In the mesh now.",
                lambda: by_tenant(lambda state: {"": len(state.running)}),
            )
        ]
    )  # fmt: skip
    meters.counters(
        [
            Metric(
                metric.TENANT_REQUESTS, "{request}", "Taken.",
                lambda: by_tenant(lambda state: {"": state.num_requests}),
            ),
            Metric(
                metric.TENANT_TOKENS, "{token}", "Of prompts and outputs, when a request ended.",
                lambda: by_tenant(lambda state: {"": state.num_tokens}),
            ),
            Metric(
                metric.TENANT_REFUSED, "{request}", "Refused, by the limit.",
                lambda: by_tenant(lambda state: state.refused),
            ),
        ]
    )  # fmt: skip


def _show_vllm(meters: Meters, parts: RouterParts, counts: RouterCounts) -> None:
    """The whole mesh as one model server."""

    def total(read: str) -> list[Point]:
        return [(sum(getattr(w.report, read) for w in _workers(parts)), _model_label(parts))]

    def usage() -> list[Point]:
        workers = _workers(parts)
        blocks = sum(w.report.blocks_total for w in workers)
        free = sum(w.report.blocks_free for w in workers)
        return [(1 - free / blocks if blocks else 0.0, _model_label(parts))]

    def config() -> list[Point]:
        blocks = sum(w.report.blocks_total for w in _workers(parts))
        known = parts.fleet.membership.model
        codec = known.format.codec if known is not None else ""
        labels = cache_config(parts.core.model.block_size, blocks, codec)
        return [(1, {**_model_label(parts), **labels})]

    meters.gauges(
        [
            Metric(metric.VLLM_WAITING, "", "In the workers' queues.", lambda: total("waiting")),
            Metric(metric.VLLM_RUNNING, "", "In the workers' batches.", lambda: total("running")),
            Metric(metric.VLLM_CACHE_USAGE, "", "Blocks in use, 0 to 1.", usage),
            Metric(metric.VLLM_CACHE_CONFIG, "", "Blocks of the workers' pools.", config),
        ]
    )
    meters.counters(
        [
            Metric(
                metric.VLLM_CACHE_QUERIES, "", "Prompt tokens looked up in the cache.",
                lambda: [(counts.prompt_tokens, _model_label(parts))],
            ),
            Metric(
                metric.VLLM_CACHE_HITS, "", "Prompt tokens found in the cache.",
                lambda: [(counts.cached_tokens, _model_label(parts))],
            ),
        ]
    )  # fmt: skip


def _workers(parts: RouterParts) -> list[WorkerState]:
    return list(parts.core.workers)


def _model_label(parts: RouterParts) -> dict[str, str]:
    known = parts.fleet.membership.model
    return {metric.MODEL_NAME: known.name if known is not None else ""}


def _members(parts: RouterParts) -> Iterable[Point]:
    kinds = Counter(lease.member.kind for lease in parts.fleet.membership.leases())
    return [(count, {metric.MEMBER_KIND: kind}) for kind, count in kinds.items()]


def _by_clock(sums: dict[str, float]) -> Iterable[Point]:
    return [(value, {names.CLOCK: clock}) for clock, value in list(sums.items()) if value]


def _decisions(counts: RouterCounts) -> Iterable[Point]:
    return [
        (count, {metric.ROUTE_KIND: kind, names.WORKER: worker})
        for (kind, worker), count in list(counts.decisions.items())
    ]
