"""Metrics of one process, and the Prometheus endpoint that shows them.

A service keeps plain counters, as it does anyway; they are read when somebody scrapes, in the
endpoint's thread, and cost nothing until then. Only what happens once per request is recorded.

The endpoint listens on loopback alone: it has neither TLS nor a token.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Histogram, Observation
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, start_http_server

from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.metric_names import VLLM

METRICS_HOST = "127.0.0.1"
METRICS_PATH = "/metrics"
READ_ATTEMPTS = 3

Point = tuple[float, Mapping[str, str]]
# What a metric is now: one number, or one for each set of labels.
Read = Callable[[], "float | Iterable[Point]"]


class Endpoint(Protocol):
    """What listens; closed once."""

    def shutdown(self) -> None: ...

    def server_close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that a service keeps. unit: UCUM, as 's', 'By' or '{token}'."""

    name: str
    unit: str
    description: str
    read: Read


class Meters:
    """One process's metrics. Unless `serve` is called nobody sees them."""

    def __init__(self, service: str = "", member: str = "") -> None:
        self._registry = CollectorRegistry()
        resource = Resource.create(
            {"service.name": f"kvmesh-{service}", "service.instance.id": member}
        )
        self._provider = MeterProvider(
            [PrometheusMetricReader(registry=self._registry, scope_info_enabled=False)],
            resource=resource,
            views=[View(instrument_name=name, name=shown) for name, shown in VLLM.items()],
            exemplar_filter=AlwaysOffExemplarFilter(),
            shutdown_on_exit=False,
        )
        self._meter = self._provider.get_meter("kvmesh")
        self._endpoint: Endpoint | None = None

    def gauges(self, metrics: Iterable[Metric]) -> None:
        """Numbers that go up and down."""
        for m in metrics:
            self._meter.create_observable_gauge(m.name, [_callback(m.read)], m.unit, m.description)

    def counters(self, metrics: Iterable[Metric]) -> None:
        """Numbers that only grow, from zero at the start of the process."""
        for m in metrics:
            callbacks = [_callback(m.read)]
            self._meter.create_observable_counter(m.name, callbacks, m.unit, m.description)

    def histogram(
        self, name: str, unit: str, description: str, boundaries: Sequence[float]
    ) -> Histogram:
        """To be recorded once per request at most: a record costs about 10 microseconds."""
        return self._meter.create_histogram(
            name, unit, description, explicit_bucket_boundaries_advisory=list(boundaries)
        )

    def serve(self, port: int) -> str:
        """Listens on loopback; the address with its real port. Raises ConfigError if it cannot."""
        try:
            server, _ = start_http_server(port, METRICS_HOST, self._registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot show metrics on {METRICS_HOST}:{port}: {error}; "
                "set another telemetry.metrics_port, or 0 for any free one"
            ) from error
        self._endpoint = server
        return f"{METRICS_HOST}:{server.server_port}"

    def close(self) -> None:
        """Stops listening. Twice is safe."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.shutdown()
            endpoint.server_close()
            self._provider.shutdown()


def cache_config(block_size: int, num_blocks: int, codec: str) -> dict[str, str]:
    """Labels of vllm:cache_config_info, by vLLM's names, whatever the device is."""
    return {
        "block_size": str(block_size),
        "num_gpu_blocks": str(num_blocks),
        "cache_dtype": codec,
    }


def _callback(read: Read) -> Callable[[CallbackOptions], list[Observation]]:
    def observe(_: CallbackOptions) -> list[Observation]:
        value = _at_rest(read)
        if isinstance(value, int | float):
            return [Observation(value)]
        return [Observation(number, labels) for number, labels in value]

    return observe


def _at_rest(read: Read) -> float | list[Point]:
    """A dict that its owner changes in another thread cannot be iterated: then it is read again."""
    for _ in range(READ_ATTEMPTS - 1):
        try:
            return _taken(read)
        except RuntimeError:
            continue
    return _taken(read)


def _taken(read: Read) -> float | list[Point]:
    value = read()
    return value if isinstance(value, int | float) else list(value)
