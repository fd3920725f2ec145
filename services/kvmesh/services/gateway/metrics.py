"""What the HTTP edge shows of itself. Labels are the edge's own routes, methods and statuses."""

import time
from collections.abc import Callable

from kvmesh.services.common import metric_names as metric
from kvmesh.services.common import names
from kvmesh.services.common.metrics import Meters, Metric

METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
OTHER = "_OTHER"  # as the conventions call a method that nobody knows
# The conventions' own boundaries end at 10 s; an answer may take longer, and a small model less.
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    30.0, 60.0, 300.0,
)  # fmt: skip


class EdgeMetrics:
    """Of HTTP requests. clock: monotonic seconds."""

    def __init__(self, meters: Meters, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.active = 0
        self._duration = meters.histogram(
            metric.HTTP_DURATION, "s", "From a request's head to the end of its answer.", SECONDS
        )
        self._first = meters.histogram(
            metric.HTTP_FIRST, "s", "From a request's head to the head of its answer.", SECONDS
        )

    def ended(
        self, method: str, route: str, status: int, duration_s: float, first_s: float | None
    ) -> None:
        """status: 0 if the client went away before an answer began; then first_s is None."""
        labels = {
            names.HTTP_METHOD: method if method in METHODS else OTHER,
            names.HTTP_ROUTE: route,
            names.HTTP_STATUS: str(status),
        }
        self._duration.record(duration_s, labels)
        if first_s is not None:
            self._first.record(first_s, labels)


def show_edge(meters: Meters, edge: EdgeMetrics, connections: Callable[[], int]) -> None:
    """Makes the gauges, which are read whenever somebody scrapes."""
    meters.gauges(
        [
            Metric(metric.HTTP_ACTIVE, "{request}", "HTTP requests now.", lambda: edge.active),
            Metric(metric.HTTP_CONNECTIONS, "{connection}", "Open now.", connections),
        ]
    )
