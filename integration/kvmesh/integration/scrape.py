"""Reads Prometheus endpoints, and what their numbers mean. Only `scrape` does I/O."""

import asyncio
import math
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from kvmesh.services.common.metrics import METRICS_PATH

SCRAPE_S = 1.0  # an endpoint that takes longer counts as not there

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Samples:
    """One process's metrics at one time, by the names that Prometheus uses."""

    values: Mapping[str, Sequence[tuple[Labels, float]]]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over all sets of labels that contain `labels`; None if there is none."""
        found = [value for own, value in self.values.get(name, ()) if labels.items() <= own.items()]
        return sum(found) if found else None

    def label_values(self, name: str, label: str) -> set[str]:
        return {own[label] for own, _ in self.values.get(name, ()) if label in own}

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Upper bound -> how many were at most that, summed over all other labels."""
        counts: dict[float, float] = {}
        for own, value in self.values.get(f"{name}_bucket", ()):
            if labels.items() <= own.items():
                bound = float(own["le"])
                counts[bound] = counts.get(bound, 0.0) + value
        return counts


NOTHING = Samples({})


def parse(text: str) -> Samples:
    """Raises ValueError for text in another format."""
    values: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name, []).append((sample.labels, float(sample.value)))
    return Samples(values)


def grown(before: float | None, now: float | None) -> float:
    """How much a counter grew; one that is smaller than before began again at zero."""
    if now is None:
        return 0.0
    return now - before if before is not None and now >= before else now


def grown_buckets(before: Mapping[float, float], now: Mapping[float, float]) -> dict[float, float]:
    """The histogram of what came between two times, or since the later start of the process."""
    if any(now.get(bound, 0.0) < count for bound, count in before.items()):
        before = {}
    return {bound: count - before.get(bound, 0.0) for bound, count in now.items()}


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """The value below which `share` of a histogram lies; None for an empty one.

    Linear within a bucket, as Prometheus' histogram_quantile: what is above the last finite bound
    counts as that bound.
    """
    bounds = sorted(buckets)
    count = buckets[bounds[-1]] if bounds else 0.0
    if count <= 0:
        return None
    rank = share * count
    lower, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank and buckets[bound] > below:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (buckets[bound] - below)
        lower, below = bound, buckets[bound]
    return lower


async def scrape(endpoints: Mapping[str, str]) -> dict[str, Samples]:
    """Member id -> its metrics, of all that answer. endpoints: member id -> host:port."""
    found = await asyncio.gather(
        *(asyncio.to_thread(_scrape_one, address) for address in endpoints.values())
    )
    return {member: samples for member, samples in zip(endpoints, found, strict=True) if samples}


def _scrape_one(address: str) -> Samples | None:
    # An opener without proxies: the endpoint is on this machine, whatever http_proxy says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{METRICS_PATH}", timeout=SCRAPE_S) as reply:
            return parse(reply.read().decode())
    except (OSError, ValueError):
        return None
