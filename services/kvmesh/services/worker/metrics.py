"""What a worker shows of itself: the engine's own load and counters, read when somebody scrapes."""

from collections.abc import Iterable

from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common import metric_names as metric
from kvmesh.services.common.metrics import Meters, Metric, Point, cache_config
from kvmesh.services.worker.hub import Hub
from kvmesh.services.worker.transfer import Transfer


def show_worker(meters: Meters, hub: Hub, transfer: Transfer) -> None:
    """Makes the worker's metrics. The load is that of the engine's last step."""
    meters.gauges(
        [
            Metric(metric.WORKER_RUNNING, "{sequence}", "In slots.", lambda: hub.load.running),
            Metric(metric.WORKER_WAITING, "{sequence}", "In the queue.", lambda: hub.load.waiting),
            Metric(
                metric.WORKER_PENDING, "{token}", "Prompt tokens that are still to be computed.",
                lambda: hub.load.pending_prefill_tokens,
            ),
            Metric(
                metric.WORKER_BATCH, "{sequence}", "Sequences in the last step.",
                lambda: hub.load.counters.batch,
            ),
            Metric(metric.POOL_BLOCKS, "{block}", "The pool.", lambda: hub.load.blocks_total),
            Metric(
                metric.POOL_FREE, "{block}", "Free, or evictable.", lambda: hub.load.blocks_free
            ),
        ]
    )  # fmt: skip
    meters.counters(
        [
            _counted(hub, metric.WORKER_STEPS, "{step}", "steps", "Steps of the engine."),
            _counted(hub, metric.WORKER_BATCHED, "{sequence}", "batched", "Summed over steps."),
            _counted(hub, metric.WORKER_GENERATED, "{token}", "tokens_generated", "Output."),
            _counted(hub, metric.WORKER_PREFILLED, "{token}", "tokens_prefilled", "Prompt."),
            _counted(
                hub, metric.WORKER_PREEMPTIONS, "{preemption}", "preemptions",
                "Sequences that gave their blocks back for others.",
            ),
            Metric(metric.MOVED_BYTES, "By", "By direction.", lambda: _moved(transfer)),
            Metric(
                metric.CHECKSUM_FAILURES, "{block}", "Blocks and tails that did not verify.",
                lambda: hub.load.counters.checksum_failures + transfer.corrupt_tails,
            ),
        ]
    )  # fmt: skip
    _show_vllm(meters, hub)


def _show_vllm(meters: Meters, hub: Hub) -> None:
    model = {metric.MODEL_NAME: hub.spec.name}
    layout = hub.spec.layout

    def usage() -> list[Point]:
        load = hub.load
        return [(1 - load.blocks_free / load.blocks_total, model)]

    def config() -> list[Point]:
        labels = cache_config(BLOCK_SIZE, hub.load.blocks_total, layout.codec)
        return [(1, {**model, **labels})]

    meters.gauges(
        [
            Metric(metric.VLLM_WAITING, "", "In the queue.", lambda: [(hub.load.waiting, model)]),
            Metric(metric.VLLM_RUNNING, "", "In the batch.", lambda: [(hub.load.running, model)]),
            Metric(metric.VLLM_CACHE_USAGE, "", "Blocks in use, 0 to 1.", usage),
            Metric(metric.VLLM_CACHE_CONFIG, "", "Blocks of the pool.", config),
        ]
    )
    meters.counters(
        [
            Metric(
                metric.VLLM_CACHE_QUERIES, "", "Prompt tokens looked up in the cache.",
                lambda: [(hub.load.counters.prefix_tokens, model)],
            ),
            Metric(
                metric.VLLM_CACHE_HITS, "", "Prompt tokens found in the cache.",
                lambda: [(hub.load.counters.prefix_hits, model)],
            ),
        ]
    )  # fmt: skip


def _counted(hub: Hub, name: str, unit: str, counter: str, description: str) -> Metric:
    return Metric(name, unit, description, lambda: getattr(hub.load.counters, counter))


def _moved(transfer: Transfer) -> Iterable[Point]:
    moved = transfer.moved
    return [
        (moved.fetched, {metric.DIRECTION: "fetch"}),
        (moved.put, {metric.DIRECTION: "put"}),
        (moved.tails, {metric.DIRECTION: "tail"}),
    ]
