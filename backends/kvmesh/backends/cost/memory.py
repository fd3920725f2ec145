"""What of a device's memory weights take, and how many tokens of KV the rest holds."""

from dataclasses import dataclass

from kvmesh.backends.architectures import WEIGHT_BYTES, ModelShape
from kvmesh.backends.cost.parallel import Formats, Parallel, check_parallel
from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import DoesNotFit, ShapeError

USABLE = 0.95  # of the memory: the rest is lost to fragmentation and growth of the runtime
STEP_TOKENS = {"gpu": 8192, "lpu": 64}  # an LPU decodes; its memory has no room for long prompts
_MOST_DEVICES = 1 << 14


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One rank's memory in bytes. kv_token_bytes: of a token of one of its sequences, unwindowed
    layers alone; kv_sequence_bytes: what windowed layers hold of a long sequence beside that."""

    device_bytes: float
    weight_bytes: float
    reserved_bytes: float
    activation_bytes: float
    kv_bytes: float
    kv_token_bytes: float
    kv_sequence_bytes: float
    window: int | None

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV that a rank holds, of one sequence as long as that."""
        return int(max(0.0, self.kv_bytes - self.kv_sequence_bytes) // self.kv_token_bytes)

    def sequence_bytes(self, context: float) -> float:
        """KV bytes of a sequence of so many tokens on a rank."""
        held = self.kv_token_bytes * context
        if self.window is not None:
            held += self.kv_sequence_bytes * min(1.0, context / self.window)
        return held

    def sequences(self, context: float) -> int:
        """Sequences of so many tokens each that fit at once."""
        return int(self.kv_bytes // self.sequence_bytes(context))


def plan_memory(
    device: Device,
    model: ModelShape,
    parallel: Parallel | None = None,
    formats: Formats | None = None,
    step_tokens: int | None = None,
    mtp: bool = False,
) -> MemoryPlan:
    """step_tokens: most tokens of a step of one rank, for its activations [by kind of device].

    Raises DoesNotFit if nothing is left for KV, saying how many devices would hold the model;
    ShapeError if it cannot be laid out so.
    """
    parallel, formats = parallel or Parallel(), formats or Formats()
    check_parallel(model, parallel)
    if step_tokens is None:
        step_tokens = STEP_TOKENS[device.kind]
    if step_tokens < 1:
        raise ShapeError(f"step_tokens is {step_tokens}, must be at least 1")
    weights, plan = _fill(device, model, parallel, formats, step_tokens, mtp)
    if plan.kv_bytes < plan.sequence_bytes(1):
        needed = _needed(device, model, formats, step_tokens, mtp)
        told = f"{needed} would hold it" if needed else f"{_MOST_DEVICES} would not hold it either"
        raise DoesNotFit(
            f"{model.name} in {formats.weights} needs {weights / 1e9:.1f} GB of weights and "
            f"{plan.activation_bytes / 1e9:.2f} GB of activations on each {device.name}, which has "
            f"{(plan.device_bytes * USABLE - plan.reserved_bytes) / 1e9:.1f} GB for them; "
            f"it does not fit {parallel.devices}, {told}",
            needed,
        )
    return plan


def _fill(
    device: Device,
    model: ModelShape,
    parallel: Parallel,
    formats: Formats,
    step_tokens: int,
    mtp: bool,
) -> tuple[float, MemoryPlan]:
    weights = rank_weight_bytes(model, parallel, formats, mtp)
    total, reserved = device.memory.bytes.value, device.memory.reserved_bytes.value
    activations = step_tokens * _activation_bytes(model, parallel)
    layers = -(-model.layers // parallel.pipeline) + (model.mtp_layers if mtp else 0)
    layer = model.kv_layer_bytes(formats.kv)
    if model.mla is None:  # the latent of MLA is whole on every tensor rank
        layer *= max(1, model.kv_heads / parallel.tensor) / model.kv_heads
    local = layers * model.window_layers / model.layers
    window = model.window.tokens if model.window else None
    free = total * USABLE - reserved - weights - activations
    return weights, MemoryPlan(
        total,
        weights,
        reserved,
        activations,
        max(0.0, free),
        # A model whose every layer has a window still needs an entry per token: a byte.
        max(1.0, (layers - local) * layer),
        local * layer * (window or 0),
        window,
    )


def _activation_bytes(model: ModelShape, parallel: Parallel) -> float:
    """Of one token: residual, normed and projected, and the widest of FFN and heads, in bf16."""
    ffn = model.ffn if model.moe is None else max(model.ffn, model.moe.top_k * model.moe.ffn)
    widest = max(3 * ffn / parallel.tensor, 4 * model.heads * model.head_dim / parallel.tensor)
    return 2 * (6 * model.hidden + widest)


def rank_weight_bytes(
    model: ModelShape, parallel: Parallel, formats: Formats, mtp: bool = False
) -> float:
    """Bytes of weights on the fullest rank."""
    t, attention = parallel.tensor, WEIGHT_BYTES[formats.projections]
    matrices = model.attention_matrices()
    whole = matrices[0].elements if model.mla else 0  # down-projections are on every tensor rank
    layer = (whole + (model.attention_elements - whole) / t) * attention
    layer += 2 * (4 if model.post_norms else 2) * model.hidden
    ffn = WEIGHT_BYTES[formats.weights]
    dense = layer + 3 * model.hidden * model.ffn / t * ffn
    experts = layer
    if model.moe is not None:
        held = -(-model.moe.experts // parallel.expert) / parallel.expert_split
        held += model.moe.shared / (1 if parallel.exchanges else t)
        experts += held * model.expert_elements * ffn + 2 * model.hidden * model.moe.experts
    share = -(-model.layers // parallel.pipeline) / model.layers
    total = share * (model.dense_layers * dense + model.moe_layers * experts)
    if mtp:
        total += model.mtp_layers * ((experts if model.moe else dense) + 4 * model.hidden**2)
    tables = 1 if model.tied or parallel.pipeline > 1 else 2
    return total + tables * 2 * model.vocab * model.hidden / t


def _needed(
    device: Device, model: ModelShape, formats: Formats, step_tokens: int, mtp: bool
) -> int | None:
    """The least number of devices that hold it: tensor parallel in a domain, then stages."""
    tensors = [n for n in (1 << k for k in range(8)) if n <= device.domain and not model.heads % n]
    best: int | None = None
    for tensor in tensors:
        expert = min(tensor, model.moe.experts) if model.moe else 1
        for pipeline in range(1, model.layers + 1):
            parallel = Parallel(tensor, expert=expert, pipeline=pipeline)
            if parallel.devices > min(_MOST_DEVICES, (best or _MOST_DEVICES + 1) - 1):
                break
            _, plan = _fill(device, model, parallel, formats, step_tokens, mtp)
            if plan.kv_bytes >= plan.sequence_bytes(1):
                best = parallel.devices
                break
    return best
