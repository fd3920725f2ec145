"""The workers of a simulated mesh: they join, report, die and come back, as the router sees it."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from kvmesh.integration.simulate.clock import VirtualClock
from kvmesh.integration.simulate.deploy import Deployed, deploy, handover_link
from kvmesh.integration.simulate.lane import Run
from kvmesh.integration.simulate.record import QueueTrack
from kvmesh.integration.simulate.scenario import Failure, Scenario, ScenarioError
from kvmesh.integration.simulate.worker import Life, SimWorker
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.config import RouterConfig
from kvmesh.services.router.core import RouterCore
from kvmesh.services.router.cost import CostModel
from kvmesh.services.worker.sequence import Update
from kvmesh.v1 import common_pb2, inference_pb2, mesh_pb2, worker_pb2

OnRun = Callable[[SimWorker, Run, list[Update]], None]
_NAMES = {"both": "worker", "prefill": "prefill", "decode": "decode"}


def worker_names(scenario: Scenario) -> list[list[str]]:
    """Of each pool: worker-0, prefill-0, decode-0 and so on, counted over all pools of a role."""
    counts: defaultdict[str, int] = defaultdict(int)
    names = []
    for pool in scenario.pools:
        first = counts[pool.role]
        counts[pool.role] += pool.workers
        names.append([f"{_NAMES[pool.role]}-{first + i}" for i in range(pool.workers)])
    return names


class SimFleet:
    """on_run: called when a worker's run has ended and the router has its report."""

    def __init__(self, scenario: Scenario, clock: VirtualClock, seed: int, on_run: OnRun) -> None:
        self._scenario = scenario
        self._clock = clock
        self._seed = seed
        self._on_run = on_run
        self.deployed = deploy(scenario)
        self.names = worker_names(scenario)
        self._pool_of = {name: i for i, names in enumerate(self.names) for name in names}
        self.core = RouterCore(
            RouterConfig(handover_min_tokens=scenario.handover_min_tokens),
            _cost_model(scenario, self.deployed),
        )
        self.workers: dict[str, SimWorker] = {}
        self.busy_s: defaultdict[str, float] = defaultdict(float)  # of lives that are over
        self.queues = [QueueTrack() for _ in scenario.pools]
        self._counts: dict[str, tuple[int, int, float]] = {}  # worker: waiting, running, KV
        self._totals = [[0, 0, 0.0] for _ in scenario.pools]
        for name in self._pool_of:
            self.join(name, 1)

    def check(self, failure: Failure) -> None:
        """Raises ScenarioError for a worker that is not there."""
        if failure.worker not in self._pool_of:
            known = ", ".join(
                names[0] + (f"..{len(names) - 1}" if len(names) > 1 else "") for names in self.names
            )
            raise ScenarioError(f"fail: no worker is named {failure.worker!r}; there are {known}")

    def join(self, name: str, incarnation: int) -> None:
        """A new life of the worker, empty."""
        pool = self._pool_of[name]
        deployed = self.deployed[pool]
        place = self.names[pool].index(name)
        rng = np.random.default_rng([self._seed, pool, place, incarnation])
        life = Life(name, incarnation, deployed, self._scenario.options, rng, self._ran)
        worker = self.workers[name] = SimWorker(life, self._clock)
        member = mesh_pb2.Member(
            member_id=name,
            incarnation=incarnation,
            kind="worker",
            role=deployed.pool.role,
            address=name,
            model=inference_pb2.ModelInfo(max_context=deployed.limits.max_context),
            device=deployed.device,
            simulated=True,
        )
        core = self.core
        core.workers.join(member)
        core.workers.connected(name, True)
        core.holder_joined(name, incarnation, shard=False)
        core.index.apply(name, common_pb2.BlockEvents(incarnation=incarnation, snapshot=True))
        report = worker.report()
        report.estimate.CopyFrom(_estimate(deployed))
        core.workers.reported(name, report)

    def fail(self, name: str) -> list[int]:
        """It is gone, with all it held. The tickets of the requests that were there."""
        worker = self.workers.pop(name, None)
        if worker is None:
            return []
        self.busy_s[name] += worker.busy_s
        lost = worker.die()
        self.core.workers.leave(name)
        self.core.holder_left(name)
        self._count(name, 0, 0, 0.0)
        return lost

    def report(self, worker: SimWorker) -> None:
        """The router hears of the worker's load and blocks."""
        report = worker.report()
        self.core.workers.reported(worker.name, report)
        events = worker.events()
        if events is not None:
            self.core.index.apply(worker.name, events)
        self._count(worker.name, report.waiting, report.running, worker.blocks_used)

    def submitted(self, worker: SimWorker) -> None:
        """A request has come to it: what waits is noted; the router hears of it after a step."""
        self._count(worker.name, worker.waiting, worker.running, worker.blocks_used)

    def busy(self, name: str) -> float:
        """Seconds in which its first stage worked, over all its lives."""
        worker = self.workers.get(name)
        return self.busy_s[name] + (worker.busy_s if worker is not None else 0.0)

    def _ran(self, worker: SimWorker, run: Run, updates: list[Update]) -> None:
        self.report(worker)
        self._on_run(worker, run, updates)

    def _count(self, name: str, waiting: int, running: int, kv: float) -> None:
        pool = self._pool_of[name]
        before = self._counts.get(name, (0, 0, 0.0))
        totals = self._totals[pool]
        for i, (old, new) in enumerate(zip(before, (waiting, running, kv), strict=True)):
            totals[i] += new - old
        self._counts[name] = waiting, running, kv
        track = self.queues[pool]
        track.at.append(self._clock.now)
        track.waiting.append(int(totals[0]))
        track.running.append(int(totals[1]))
        track.kv_share.append(totals[2] / len(self.names[pool]))


def _cost_model(scenario: Scenario, deployed: tuple[Deployed, ...]) -> CostModel:
    _, latency = handover_link(scenario)
    prefilling = next((d for d in deployed if d.pool.role == "prefill"), deployed[0])
    return CostModel(
        step_tokens=prefilling.limits.step_tokens * prefilling.ranks,
        transfer_bytes_s=prefilling.send_bytes_s,
        transfer_base_s=latency,
        block_size=BLOCK_SIZE,
        block_bytes=round(scenario.model.kv_bytes_per_token(scenario.options.kv) * BLOCK_SIZE),
    )


def _estimate(deployed: Deployed) -> worker_pb2.Estimate:
    estimate = deployed.estimate
    return worker_pb2.Estimate(
        base_s=estimate.base_s,
        prefill_token_s=estimate.prefill_token_s,
        decode_token_s=estimate.decode_token_s,
        context_token_s=estimate.context_token_s,
        simulated=True,
    )
