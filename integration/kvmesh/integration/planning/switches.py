"""The optimisations that a waterfall switches on and off, and the mesh that each set of them makes.

Each acts on what it acts on in the simulator: bytes, times, decisions or the layout of workers. None
is a factor.
"""

from dataclasses import dataclass

from kvmesh.backends.architectures import ModelShape
from kvmesh.backends.cost.memory import plan_memory
from kvmesh.backends.cost.parallel import Formats, Parallel
from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import DoesNotFit
from kvmesh.integration.planning.choice import ACCEPTANCE
from kvmesh.integration.planning.traffic import Workload
from kvmesh.integration.simulate import Optimisations, Scenario, WorkerPool

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


@dataclass(frozen=True, slots=True)
class Setup:
    """What is fixed while optimisations are switched. instances: of the aggregated mesh.
    narrow, wide: layouts of an instance. prefill_share: of the devices, where prompts have their
    own. kv: the format that KV compression means."""

    model: ModelShape
    formats: Formats
    kv: str
    narrow: Parallel
    wide: Parallel
    instances: int
    prefill_share: float
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


def setup_of(
    model: ModelShape, device: Device, formats: Formats, kv: str, prefill_share: float
) -> Setup:
    """Layouts: with experts, the smallest number of attention replicas that holds them, and four
    times as many for the wide one; else tensor ranks. Sixteen devices or four instances.

    Raises DoesNotFit if the model fits no layout within a scale-up domain.
    """
    base = Formats(formats.weights, _BASE_KV, formats.attention)
    narrow = _narrow(model, device, base)
    wide = narrow
    if model.moe is not None:
        ranks = min(4 * narrow.data, device.domain, model.moe.experts)
        ranks -= ranks % narrow.data
        wide = Parallel(data=ranks, expert=ranks)
    instances = max(4, 16 // narrow.devices, wide.devices // narrow.devices)
    return Setup(model, formats, kv, narrow, wide, instances, prefill_share)


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
    devices = setup.instances * setup.narrow.devices
    if DISAGG not in on:
        return (_pool(setup, layout, devices // layout.devices, "both"),)
    # Whole instances on both sides; devices are counted as they come out.
    prefill = max(1, round(devices * setup.prefill_share / setup.narrow.devices))
    decode = max(1, round((devices - prefill * setup.narrow.devices) / layout.devices))
    return (
        _pool(setup, setup.narrow, prefill, "prefill"),
        _pool(setup, layout, decode, "decode"),
    )


def _pool(setup: Setup, layout: Parallel, workers: int, role: str) -> WorkerPool:
    return WorkerPool(max(1, workers), layout, role, _SLOTS, setup.step_tokens)  # type: ignore[arg-type]
