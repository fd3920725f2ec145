"""Metrics as a scraper reads them over HTTP."""

import socket
import urllib.error
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scraping import scraped

from kvmesh.services.common import metric_names
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.metrics import READ_ATTEMPTS, Meters, Metric


@pytest.fixture
def meters() -> Iterator[Meters]:
    made = Meters("router", "router")
    yield made
    made.close()


def test_metrics_are_read_when_they_are_scraped(meters: Meters):
    counts = {"a": 1}
    meters.counters(
        [
            Metric("kvmesh.kv.moved", "By", "Bytes.", lambda: counts["a"]),
            Metric("kvmesh.steps", "{step}", "By kind.", lambda: [(2, {"k.d": "x"}), (3, {})]),
        ]
    )
    meters.gauges([Metric("kvmesh.level", "s", "Now.", lambda: 0.5)])
    address = meters.serve(0)
    assert scraped(address)["kvmesh_kv_moved_bytes_total"] == [({}, 1.0)]
    counts["a"] = 5
    found = scraped(address)
    assert found["kvmesh_kv_moved_bytes_total"] == [({}, 5.0)]
    assert sorted(found["kvmesh_steps_total"], key=str) == [({"k_d": ""}, 3.0), ({"k_d": "x"}, 2.0)]
    assert found["kvmesh_level_seconds"] == [({}, 0.5)]
    assert found["target_info"][0][0]["service_instance_id"] == "router"


def test_metrics_have_the_names_that_other_routers_look_for(meters: Meters):
    """As vLLM exposes them; a counter's name gets _total there, too."""
    counters = (metric_names.VLLM_CACHE_QUERIES, metric_names.VLLM_CACHE_HITS)
    gauges = [name for name in metric_names.VLLM if name not in counters]
    model = {"model_name": "m"}
    meters.gauges(Metric(name, "", "x", lambda: [(1, model)]) for name in gauges)
    meters.counters(Metric(name, "", "x", lambda: [(1, model)]) for name in counters)
    found = scraped(meters.serve(0))
    assert {name for name in found if name.startswith("vllm")} == {
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
    }
    assert found["vllm:num_requests_waiting"] == [(model, 1.0)]


def failing(times: int) -> Callable[[], Any]:
    """Fails as a dict does that is changed while it is iterated."""
    left = [times]

    def read() -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("dictionary changed size during iteration")
        return [(1, {})]

    return read


def test_metrics_that_change_while_they_are_read_are_read_again(meters: Meters):
    meters.gauges([Metric("kvmesh.a", "", "x", failing(READ_ATTEMPTS - 1))])
    assert scraped(meters.serve(0))["kvmesh_a"] == [({}, 1.0)]


def test_metrics_of_one_reader_that_fails_cost_no_others(meters: Meters):
    meters.gauges(
        [Metric("kvmesh.a", "", "x", failing(99)), Metric("kvmesh.b", "", "x", lambda: 2)]
    )
    found = scraped(meters.serve(0))
    assert "kvmesh_a" not in found
    assert found["kvmesh_b"] == [({}, 2.0)]


def test_metrics_listen_on_loopback_and_stop(meters: Meters):
    address = meters.serve(0)
    assert address.startswith("127.0.0.1:")
    meters.close()
    meters.close()
    with pytest.raises(urllib.error.URLError):
        scraped(address)


@pytest.mark.parametrize("port", [None, 70_000])
def test_metrics_port_that_cannot_be_had(meters: Meters, port: int | None):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = taken.getsockname()[1] if port is None else port
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{wanted}.*telemetry\.metrics_port"):
            meters.serve(wanted)
