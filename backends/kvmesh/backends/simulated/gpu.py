"""Seconds of a step on a simulated GPU, or on a rack of them, op by op."""

import functools
from dataclasses import dataclass
from math import gcd

from kvmesh.backends.architectures import ModelShape
from kvmesh.backends.base import DeviceInfo, Estimate, StepShape
from kvmesh.backends.cost.estimate import linear_estimate
from kvmesh.backends.cost.links import host_gap_s
from kvmesh.backends.cost.memory import plan_memory
from kvmesh.backends.cost.parallel import Formats, Parallel
from kvmesh.backends.cost.shapes import StepWork
from kvmesh.backends.cost.step import StepCost
from kvmesh.backends.devices.device import Device
from kvmesh.backends.simulated.device import device_info


def lay_out(model: ModelShape, count: int) -> Parallel:
    """How `count` devices share a model: experts spread over all, each with sequences of its own; a
    dense one by heads as far as they divide, then by sequences."""
    if model.moe is not None and count > 1:
        return Parallel(data=count, expert=gcd(count, model.moe.experts))
    tensor = gcd(count, model.heads)
    return Parallel(tensor=tensor, data=count // tensor)


def work_of(shape: StepShape) -> StepWork:
    """The work of a whole instance; windowed layers are worked out from the means."""
    return StepWork(
        prefill_tokens=shape.prefill_tokens,
        prefill_chunks=shape.prefill_chunks,
        prefill_attended=shape.context_tokens - shape.decode_context,
        prefill_context=shape.prefill_context,
        prefill_outputs=shape.prefill_outputs,
        decode_sequences=shape.decode_sequences,
        decode_context=shape.decode_context,
    )


@dataclass(frozen=True)
class GpuClock:
    """cost: of an instance. name: for people. kv_ratio: bytes of KV of the model that is timed for
    one of the model that computes; 1 if they are the same."""

    cost: StepCost
    name: str
    kv_ratio: float = 1.0

    @property
    def device(self) -> DeviceInfo:
        return device_info(self.cost.device, self.cost.parallel.devices, self.name, self.kv_ratio)

    def step_seconds(self, shape: StepShape) -> float:
        return self.cost.step(self.cost.instance(work_of(shape))).latency_s

    def idle_seconds(self, shape: StepShape) -> float:
        """The host's gap, which is part of step_seconds."""
        if shape.prefill_tokens + shape.decode_sequences == 0:
            return 0.0
        work = self.cost.instance(work_of(shape))
        return host_gap_s(self.cost.device, work.prefill_chunks + work.decode_sequences)

    def estimate(self) -> Estimate:
        return self._estimate

    @functools.cached_property
    def _estimate(self) -> Estimate:
        return linear_estimate(self.cost)


def gpu_clock(
    device: Device,
    own: ModelShape,
    timed: ModelShape | None,
    count: int,
    weights: str,
    codec: str,
) -> GpuClock:
    """own: the model that computes. timed: the one whose steps are timed [own].

    Raises DoesNotFit, saying how many devices would hold it; ShapeError or DeviceError for what
    does not go together.
    """
    model, formats = timed or own, Formats(weights=weights, kv=codec)
    parallel = lay_out(model, count)
    plan_memory(device, model, parallel, formats)
    cost = StepCost(device, model, parallel, formats)
    name = device.title or device.name
    name += f" x {count}" if count > 1 else ""
    name += f", timed as {timed.name}" if timed is not None else ""
    return GpuClock(cost, name, kv_ratio(own, timed, codec))


def kv_ratio(own: ModelShape, timed: ModelShape | None, codec: str) -> float:
    """Bytes of KV per token of `timed` for each of `own`."""
    if timed is None:
        return 1.0
    own_bytes = own.layers * own.kv_layer_bytes(codec)
    return timed.layers * timed.kv_layer_bytes(codec) / own_bytes
