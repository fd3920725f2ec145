"""The optimisations that a waterfall switches on and off, and the mesh that each set makes.

Each acts in the simulator on what it acts on in the world: bytes, times, decisions or the layout of
workers. None is a factor.
"""

from dataclasses import dataclass

from kvmesh.backends.architectures import ModelShape
from kvmesh.backends.cost.memory import plan_memory
from kvmesh.backends.cost.parallel import Formats, Parallel
from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import DoesNotFit
from kvmesh.integration.planning.choice import ACCEPTANCE
from kvmesh.integration.planning.traffic import Workload
from kvmesh.integration.simulate import Optimisations, Result, Scenario, WorkerPool

KV, FUSED, BALANCE, DISAGG, WIDE, MTP, ROUTING = (
    "kv", "fused", "balance", "disagg", "wide-ep", "mtp", "routing",
)  # fmt: skip
TITLES = {
    KV: "KV compression",
    FUSED: "fused kernels",
    BALANCE: "attention-DP balancing",
    DISAGG: "disaggregation",
    WIDE: "wide expert parallelism",
    MTP: "multi-token prediction",
    ROUTING: "KV-aware routing",
}
_SLOTS = 2048  # sequences of a rank: memory and limits bind before
_BASE_KV = "fp16"
_INSTANCES = 2
_PREFILL_BUSY = 0.8


@dataclass(frozen=True, slots=True)
class Setup:
    """What is fixed while optimisations are switched. instances: of the aggregated mesh.
    narrow, wide: layouts of an instance; prompts that have devices of their own have one of the
    narrow ones. kv: the format that KV compression means."""

    model: ModelShape
    formats: Formats
    kv: str
    narrow: Parallel
    wide: Parallel
    instances: int
    step_tokens: int = 8192


def applicable(model: ModelShape, workload: Workload, instances: int) -> dict[str, str]:
    """Name -> why it can change nothing here; empty text where it can."""
    shared = workload.share_prefixes and (
        workload.session.shared_tokens > 0 or workload.session.turns.mean > 1
    )
    return {
        KV: "",
        FUSED: "",
        BALANCE: "" if model.moe else f"{model.name} has no attention replicas that share experts",
        DISAGG: "",
        WIDE: "" if model.moe else f"{model.name} has no experts",
        MTP: "" if model.mtp_layers else f"{model.name} has no layer of multi-token prediction",
        ROUTING: "" if shared and instances > 1 else "no prompts share a beginning here",
    }


def setup_of(model: ModelShape, device: Device, formats: Formats, kv: str) -> Setup:
    """Layouts: with experts, the smallest number of attention replicas that holds them with room
    for KV, and twice as many for the wide one; else tensor ranks. Two instances, which routing
    needs at least: all that is measured is per device.

    Raises DoesNotFit if the model fits no layout within a scale-up domain.
    """
    base = Formats(formats.weights, _BASE_KV, formats.attention)
    narrow = _narrow(model, device, base)
    wide = narrow
    if model.moe is not None:
        ranks = min(2 * narrow.data, device.domain, model.moe.experts)
        wide = Parallel(data=ranks, expert=ranks)
    return Setup(model, formats, kv, narrow, wide, _INSTANCES)


def _narrow(model: ModelShape, device: Device, formats: Formats) -> Parallel:
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= device.domain]
    error: DoesNotFit | None = None
    for size in sizes:
        if model.moe is not None:
            layout = Parallel(data=size, expert=size)
        elif model.heads % size == 0:
            layout = Parallel(tensor=size)
        else:
            continue
        try:
            plan = plan_memory(device, model, layout, formats, mtp=bool(model.mtp_layers))
        except DoesNotFit as found:
            error = found
            continue
        # Room for the weights alone is no room to serve: half as much again is for KV.
        if plan.kv_bytes >= plan.weight_bytes / 2:
            return layout
    if error is not None:
        raise error
    raise DoesNotFit(f"{model.name} leaves too little memory for KV on {device.name}", None)


def scenario_of(setup: Setup, on: frozenset[str], device: Device) -> Scenario:
    """The mesh with just these optimisations."""
    options = Optimisations(
        kv=setup.kv if KV in on else _BASE_KV,
        fused=FUSED in on,
        balance=BALANCE in on,
        expert_balance=True,
        acceptance=ACCEPTANCE if MTP in on else (),
        policy="kv-aware" if ROUTING in on else "round-robin",
    )
    return Scenario(
        setup.model,
        device,
        _pools(setup, on),
        options,
        setup.formats.weights,
        setup.formats.attention,
    )


def _pools(setup: Setup, on: frozenset[str]) -> tuple[WorkerPool, ...]:
    layout = setup.wide if WIDE in on else setup.narrow
    workers = max(1, setup.instances * setup.narrow.devices // layout.devices)
    if DISAGG not in on:
        return (_pool(setup, layout, workers, "both"),)
    prompts = _pool(setup, setup.narrow, 1, "prefill")
    return prompts, _pool(setup, layout, workers, "decode")


def counted_devices(result: Result) -> float:
    """Devices that this load takes. A fleet shares its pool for prompts, so those devices count by
    the share of their time that is used, with a fifth kept free."""
    return sum(
        pool.devices * (min(1.0, pool.busy / _PREFILL_BUSY) if pool.role == "prefill" else 1.0)
        for pool in result.pools
    )


def _pool(setup: Setup, layout: Parallel, workers: int, role: str) -> WorkerPool:
    return WorkerPool(max(1, workers), layout, role, _SLOTS, setup.step_tokens)  # type: ignore[arg-type]
