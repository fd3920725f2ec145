"""A GPU that attends and an LPU that runs the FFN of every layer, as one device.

A layer is attention, the way to the LPU, its FFN, and the way back; nothing overlaps, so a step is
the sum of all layers. The head, the first norm of each layer and the host's gap stay with the GPU.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvmesh.backends.architectures import ModelShape
from kvmesh.backends.base import DeviceInfo, Estimate, StepShape
from kvmesh.backends.cost.estimate import fitted_estimate
from kvmesh.backends.cost.parallel import Formats
from kvmesh.backends.cost.shapes import StepWork
from kvmesh.backends.cost.step import StepCost
from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import ShapeError
from kvmesh.backends.lpu.ffn import ffn_clock
from kvmesh.backends.lpu.shapes import ModelShape as DenseShape
from kvmesh.backends.simulated.device import device_info
from kvmesh.backends.simulated.gpu import GpuClock, work_of

_FFN = ("ffn_", "shared_", "experts", "router", "moe_tokens", "dispatch", "combine")
# Of a layer's two norms and two all-reduces, the second belongs to the FFN.
_HALVED = ("norms", "all_reduce")
_ACTIVATION_BYTES = 2  # FP16, of each element of the hidden state


@dataclass(frozen=True)
class SplitClock:
    """attention: a whole model's clock, of which only the part that is not FFN counts.

    ffn_seconds: of all layers' FFNs for so many tokens. ffn: the devices that run them.
    hop_base_s, hop_byte_s: of one way between the two, the slower of both.
    """

    attention: GpuClock
    ffn_seconds: Callable[[int], float]
    ffn: DeviceInfo
    hop_base_s: float
    hop_byte_s: float

    @property
    def device(self) -> DeviceInfo:
        gpu, ffn = self.attention.device, self.ffn
        prices = gpu.count * gpu.price_per_hour, ffn.count * ffn.price_per_hour
        return replace(
            gpu,
            name=f"{gpu.name} (attention) + {ffn.name} (FFN)",
            architecture=f"{gpu.architecture}+{ffn.architecture}",
            memory_bytes=gpu.memory_bytes + ffn.memory_bytes,
            bandwidth_bytes_s=0.0,
            peak_flops=(),
            power_w=gpu.power_w + ffn.power_w if gpu.power_w and ffn.power_w else 0.0,
            price_per_hour=sum(prices) if all(prices) else 0.0,
            price_source=f"{gpu.price_source}; {ffn.price_source}" if all(prices) else "",
            count=1,  # what has two prices is one device at their sum
        )

    def hops_seconds(self, tokens: int) -> float:
        """Two ways per layer, each with the hidden state of every token."""
        model = self.attention.cost.model
        size = tokens * model.hidden * _ACTIVATION_BYTES
        return 2 * model.layers * (self.hop_base_s + size * self.hop_byte_s)

    def step_seconds(self, shape: StepShape) -> float:
        return self._seconds(work_of(shape))

    def idle_seconds(self, shape: StepShape) -> float:
        return self.attention.idle_seconds(shape)

    def estimate(self) -> Estimate:
        return self._estimate

    @functools.cached_property
    def _estimate(self) -> Estimate:
        return fitted_estimate(self._seconds, self.attention.cost.model)

    def _seconds(self, work: StepWork) -> float:
        tokens = work.prefill_tokens + work.decode_sequences
        if tokens == 0:
            return 0.0
        cost = self.attention.cost
        times = cost.step(cost.instance(work)).by_name()
        attention_s = sum(_attention_part(name, seconds) for name, seconds in times.items())
        return attention_s + self.ffn_seconds(tokens) + self.hops_seconds(tokens)


def _attention_part(name: str, seconds: float) -> float:
    if name.startswith(_FFN):
        return 0.0
    return seconds / 2 if name in _HALVED else seconds


def split_clock(attention: GpuClock, device: Device) -> SplitClock:
    """The FFN of attention's model on `device`: an LPU by its cycles, or one of rooflines alone.

    Raises ShapeError for a model that the LPU's compiler does not take, ModelDoesNotFit.
    """
    model, gpu = attention.cost.model, attention.cost.device
    if device.model == "cycle":
        ffn = ffn_clock(_dense(model, device))
        seconds, count = ffn.seconds, ffn.chips
    else:
        cost = StepCost(device, model, formats=Formats(weights="fp8", kv="fp16"))
        seconds, count = functools.partial(_ffn_ops_s, cost), _holding(device, model)
    ends = gpu.scale_out, device.scale_out
    latencies = [end.latency_s.value if end.latency_s else 0.0 for end in ends]
    name = f"{device.title} x {count}"
    return SplitClock(
        attention,
        seconds,
        device_info(device, count, name, 1.0),
        sum(latencies),  # a message leaves by one link and comes by the other
        max(1 / end.bandwidth_bytes_s.value for end in ends),
    )


def _ffn_ops_s(cost: StepCost, tokens: int) -> float:
    times = cost.step(StepWork.of((), [1] * tokens)).by_name()
    return sum(seconds for name, seconds in times.items() if name.startswith(_FFN))


def _holding(device: Device, model: ModelShape) -> int:
    """As many as hold the FFNs in one byte a weight."""
    dense = 3 * model.hidden * model.ffn * model.dense_layers
    experts = model.moe.experts + model.moe.shared if model.moe else 0
    total = dense + model.moe_layers * experts * model.expert_elements
    return max(1, -(-total // int(device.memory.bytes.value)))


def _dense(model: ModelShape, device: Device) -> DenseShape:
    if model.moe is not None:
        raise ShapeError(f"{device.name} is compiled for dense FFNs; {model.name} has experts")
    return DenseShape(
        model.name, model.layers, model.hidden, model.heads, model.kv_heads, model.head_dim,
        model.ffn, model.vocab, model.max_context,
    )  # fmt: skip
