"""From a scenario to what each worker is: its clockwork, its memory, its limits, its links."""

import math
from dataclasses import dataclass

from kvmesh.backends.base import Estimate
from kvmesh.backends.cost.estimate import linear_estimate
from kvmesh.backends.cost.memory import plan_memory
from kvmesh.backends.cost.parallel import Options, Parallel
from kvmesh.backends.cost.step import StepCost
from kvmesh.integration.simulate.scenario import Scenario, ScenarioError, WorkerPool
from kvmesh.integration.simulate.timing import CostTimer, EstimateTimer, StepTimer
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.worker.limits import Limits

_UNBOUNDED = 1 << 30
_WINDOW_SHARE = 0.5  # most of the KV memory that is set aside for windowed layers


@dataclass(frozen=True, slots=True)
class Deployed:
    """The workers of one pool.

    ranks: attention replicas, each with sequences and blocks of its own. lanes: batches that are in
    the pipeline at once. limits: of one rank and lane. send_bytes_s: K and V that a worker's
    devices can send, each its own part.
    """

    pool: WorkerPool
    device: str
    timer: StepTimer
    estimate: Estimate
    limits: Limits
    ranks: int
    lanes: int
    send_bytes_s: float
    window: int | None

    @property
    def kv_tokens(self) -> int:
        """That one attention rank holds."""
        return self.limits.num_blocks * BLOCK_SIZE * self.lanes


def deploy(scenario: Scenario) -> tuple[Deployed, ...]:
    """One for each pool.

    Raises ScenarioError, DoesNotFit if the model does not fit a worker's devices, ShapeError if it
    cannot be laid out so, DeviceError for a device without the figures that are needed.
    """
    bandwidth, _ = handover_link(scenario)
    return tuple(_deploy_pool(scenario, pool, bandwidth) for pool in scenario.pools)


def _deploy_pool(scenario: Scenario, pool: WorkerPool, bandwidth: float) -> Deployed:
    options, parallel = scenario.options, pool.parallel
    device = scenario.device_name(pool)
    drafts = 0 if pool.role == "prefill" else len(options.acceptance)
    timer, estimate = _clockwork(scenario, pool, drafts)
    lanes = parallel.pipeline
    blocks = scenario.kv_blocks or _blocks(scenario, pool, bool(drafts)) // lanes
    if blocks < 1:
        raise ScenarioError(
            f"KV memory of {scenario.model.name} on a {device} holds no block of {BLOCK_SIZE} "
            f"tokens for each of {lanes} stages; take more devices per worker"
        )
    limits = Limits(
        slots=max(1, pool.slots // lanes),
        num_blocks=blocks,
        max_context=scenario.model.max_context,
        max_waiting=_UNBOUNDED,
        step_tokens=pool.step_tokens,
        prefill_chunk=pool.prefill_chunk or pool.step_tokens,
        adopt_blocks=_UNBOUNDED if scenario.estimate is None else Limits(1, 1, 1).adopt_blocks,
    )
    send = bandwidth * _shards(scenario, parallel)
    window = scenario.model.window.tokens if scenario.model.window else None
    return Deployed(pool, device, timer, estimate, limits, parallel.data, lanes, send, window)


def _clockwork(scenario: Scenario, pool: WorkerPool, drafts: int) -> tuple[StepTimer, Estimate]:
    if scenario.estimate is not None:
        return EstimateTimer(scenario.estimate), scenario.estimate
    options = scenario.options
    cost = StepCost(
        scenario.device_of(pool),
        scenario.model,
        pool.parallel,
        scenario.formats(),
        Options(
            "placed" if options.expert_balance else "power_law",
            drafts,
            options.fused,
        ),
    )
    return CostTimer(cost), linear_estimate(cost)


def _blocks(scenario: Scenario, pool: WorkerPool, mtp: bool) -> int:
    plan = plan_memory(
        scenario.device_of(pool),
        scenario.model,
        pool.parallel,
        scenario.formats(),
        pool.step_tokens,
        mtp,
    )
    # Blocks hold the layers without a window; what the others hold of each sequence goes off first.
    windows = min(pool.slots * plan.kv_sequence_bytes, _WINDOW_SHARE * plan.kv_bytes)
    return int((plan.kv_bytes - windows) // (plan.kv_token_bytes * BLOCK_SIZE))


def _shards(scenario: Scenario, parallel: Parallel) -> int:
    """Devices of a worker that each hold a part of a sequence's K and V: the latent of MLA is whole
    on every tensor rank."""
    heads = 1 if scenario.model.mla is not None else scenario.model.kv_heads
    return min(parallel.tensor, heads) * parallel.pipeline


def handover_link(scenario: Scenario) -> tuple[float, float]:
    """(bytes/s of a device, seconds of latency) that K and V are handed over with."""
    device = scenario.device
    if device is None:
        return scenario.transfer_bytes_s or math.inf, 0.0
    link = scenario.link or ("scale-up" if scenario.devices <= device.domain else "scale-out")
    chosen = device.scale_up if link == "scale-up" else device.scale_out
    latency = chosen.latency_s.value if chosen.latency_s else 0.0
    return scenario.transfer_bytes_s or chosen.bandwidth_bytes_s.value, latency
