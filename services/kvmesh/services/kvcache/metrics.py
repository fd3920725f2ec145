"""What a shard shows of itself: its store's counts, read when somebody scrapes."""

from collections.abc import Callable, Iterable

from kvmesh.services.common import metric_names as metric
from kvmesh.services.common.metrics import Meters, Metric, Point
from kvmesh.services.kvcache.memory import BlockMemory
from kvmesh.services.kvcache.outcomes import StoreStats
from kvmesh.services.kvcache.servicer import ShardCounts

_GAUGES = (
    (metric.SHARD_BLOCKS, "{block}", "blocks", "Held now."),
    (metric.SHARD_USED, "By", "bytes_used", "Bytes of the blocks held."),
    (metric.SHARD_BUDGET, "By", "bytes_budget", "Bytes that may be held."),
    (metric.SHARD_LEASES, "{lease}", "leases", "Open now."),
)
_COUNTERS = (
    (metric.SHARD_HITS, "{block}", "hits", "Found by Get."),
    (metric.SHARD_MISSES, "{block}", "misses", "Not found by Get."),
    (metric.SHARD_PUTS, "{block}", "puts", "Stored."),
    (metric.SHARD_EVICTIONS, "{block}", "evictions", "Made room for others."),
)


def show_shard(
    meters: Meters, stats: Callable[[], StoreStats], memory: BlockMemory, counts: ShardCounts
) -> None:
    """Makes the shard's metrics."""

    def metric_of(name: str, unit: str, field: str, description: str) -> Metric:
        return Metric(name, unit, description, lambda: getattr(stats(), field))

    def moved() -> Iterable[Point]:
        return [
            (counts.bytes_in, {metric.DIRECTION: "in"}),
            (counts.bytes_out, {metric.DIRECTION: "out"}),
        ]

    meters.gauges(metric_of(*row) for row in _GAUGES)
    meters.gauges(
        [
            Metric(
                metric.SHARD_ON_DEVICE, "By", "Of those, bytes in a device's memory.",
                lambda: memory.device_bytes,
            )
        ]
    )  # fmt: skip
    meters.counters(metric_of(*row) for row in _COUNTERS)
    meters.counters(
        [
            Metric(metric.MOVED_BYTES, "By", "By direction.", moved),
            Metric(
                metric.CHECKSUM_FAILURES, "{block}", "Blocks that did not verify.",
                lambda: counts.checksum_failures,
            ),
        ]
    )  # fmt: skip
