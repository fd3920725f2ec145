"""Handing K and V over from a prefill to a decode worker: one after another on each link."""

from kvmesh.integration.simulate.clock import VirtualClock
from kvmesh.integration.simulate.deploy import handover_link
from kvmesh.integration.simulate.scenario import Scenario
from kvmesh.integration.simulate.worker import SimWorker
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.worker.sequence import Fetched


class Transfers:
    """A transfer takes latency + bytes / rate, at the slower end's rate, once both are free."""

    def __init__(self, scenario: Scenario, clock: VirtualClock) -> None:
        self._clock = clock
        self._model = scenario.model
        self._kv = scenario.options.kv
        _, self._latency_s = handover_link(scenario)

    def start(
        self, ends: tuple[SimWorker | None, SimWorker], ticket: int, fetched: Fetched
    ) -> tuple[float, float]:
        """Begins as soon as it can; (begin, end) of it. A source that is gone, or goes meanwhile,
        gives nothing, and the target computes what it lacks."""
        source, target = ends
        now = self._clock.now
        if source is None:
            self._clock.at(now, lambda: target.fetched(ticket, Fetched()))
            return now, now
        begin = max(now, source.sends_until, target.sends_until)
        rate = min(source.life.deployed.send_bytes_s, target.life.deployed.send_bytes_s)
        end = begin + self._latency_s + self._bytes(fetched) / rate
        source.sends_until = target.sends_until = end

        def arrived() -> None:
            target.fetched(ticket, fetched if source.alive else Fetched())

        self._clock.at(end, arrived)
        return begin, end

    def _bytes(self, fetched: Fetched) -> float:
        """Sealed blocks in the codec; the tail in 16 bits."""
        total = 0.0
        if fetched.blocks:
            total += self._model.kv_bytes(len(fetched.blocks) * BLOCK_SIZE, self._kv)
        if fetched.tail is not None:
            total += self._model.kv_elements_per_token * fetched.tail.num_tokens * 2
        return total
