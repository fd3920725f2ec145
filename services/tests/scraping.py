"""What a Prometheus endpoint shows, for tests."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

Scraped = dict[str, list[tuple[dict[str, str], float]]]


def scraped(address: str) -> Scraped:
    """Sample name -> its labels and values."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    found: Scraped = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def one(found: Scraped, name: str, **labels: str) -> float:
    """The value of the only sample with these labels."""
    (value,) = [value for own, value in found[name] if labels.items() <= own.items()]
    return value
