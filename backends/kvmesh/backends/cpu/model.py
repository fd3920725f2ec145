"""A model on the CPU: dense stages in ONNX Runtime, attention over the pool in our kernels."""

import platform
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.backends.base import (
    DeviceInfo,
    Estimate,
    ModelOptions,
    ModelSpec,
    Segment,
    StepShape,
    StepTimes,
)
from kvmesh.backends.cost.fit import StepFit
from kvmesh.backends.cpu.memory import memory_bytes, processor_name
from kvmesh.backends.cpu.pool import CpuPool
from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.loader import Checkpoint
from kvmesh.backends.models.spec import model_spec
from kvmesh.backends.ort import SessionOptions, StagePipeline
from kvmesh.backends.pool import count_blocks
from kvmesh.backends.steps import StepLimits, flatten
from kvmesh.backends.warmup import touched, warm_up_steps
from kvmesh.kernels.cpu import step as kernel
from kvmesh.kernels.errors import CodecError

Floats = npt.NDArray[np.float32]

# A device of this backend is a core. The price is a plain one of large clouds, on demand.
_CORE_USD_H = 0.04
_CORE_SOURCE = "about a cloud's core on demand; price_usd_per_hour sets yours"
_POOL_LIMIT_BYTES = 2 << 30
# Proportions of a small model on one core; its own steps soon set the magnitudes.
_PRIOR = Estimate(3e-4, 1e-4, 1e-4, 5e-7)


Watch = Callable[[int, tuple[Floats, Floats, Floats]], None]


class CpuModel:
    """See base.Model. clock: seconds, monotonic.

    watch: called in each step with (layer, (q, k, v)) before the layer's attention, for those who
    study a model; fp32 [tokens, heads, head dim], q and k after RoPE, valid during the call.
    """

    watch: Watch | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: ModelOptions,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config = checkpoint.config
        self._spec = model_spec(checkpoint, options)
        layout = self._spec.layout
        num_blocks = count_blocks(layout, config.max_context, options, _budget(options))
        self._pool = CpuPool(layout, num_blocks, options.num_slots)
        self._limits = StepLimits(
            vocab_size=config.vocab_size,
            max_context=config.max_context,
            max_tokens=options.max_step_tokens,
            num_blocks=num_blocks,
            num_slots=options.num_slots,
        )
        self._centers = checkpoint.centers
        self._threads = options.threads
        self._stages = StagePipeline(
            checkpoint, options.max_step_tokens, SessionOptions(options.threads, options.spin)
        )
        self._threads = options.threads
        self._clock = clock
        self._fit = StepFit(_PRIOR)
        kernel.warm()
        try:
            self._warm_up()
        except CodecError as error:
            raise CheckpointError(
                f"{checkpoint.root}: computes no finite K and V: {error}"
            ) from error

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def device(self) -> DeviceInfo:
        return DeviceInfo(
            name=processor_name(),
            kind="measured",
            architecture=platform.machine(),
            memory_bytes=memory_bytes("MemTotal", 0),
            price_per_hour=_CORE_USD_H,
            price_source=_CORE_SOURCE,
            count=self._threads,
        )

    @property
    def pool(self) -> CpuPool:
        return self._pool

    def forward(self, segments: Sequence[Segment]) -> npt.NDArray[np.float32]:
        """See base.Model.forward."""
        began = self._clock()
        step = flatten(segments, self._limits)
        tokens = len(step.ids)
        layout, pool, stages = self._pool.layout, self._pool, self._stages
        plan = kernel.StepPlan(
            row_start=step.row_start, pos=step.start, slot=step.slot, tables=step.tables
        )
        buffers = stages.buffers
        buffers.ids[:tokens] = step.ids
        buffers.positions[:tokens, 0] = step.positions
        qkv = buffers.q[:tokens], buffers.k[:tokens], buffers.v[:tokens]
        out = buffers.attention[:tokens]
        seal_s = 0.0
        for layer in range(layout.num_layers):
            stages.run(layer, tokens)
            if self.watch is not None:
                self.watch(layer, qkv)
            ready = self._clock()
            share = kernel.run_layer(
                layout, pool.blocks, pool.tails, plan, layer, qkv, self._centers, out,
                self._threads,
            )  # fmt: skip
            seal_s += share * (self._clock() - ready)
        if len(step.filled):
            sealed = self._clock()
            kernel.finish_blocks(layout, pool.blocks, step.filled)
            seal_s += self._clock() - sealed
        logits = stages.logits(tokens, step.wanted)
        total_s = self._clock() - began
        self._last_step = StepTimes(total_s, seal_s, len(step.filled))
        self._last_shape = step.shape
        self._fit.observe(step.shape, total_s)
        return logits

    @property
    def last_step(self) -> StepTimes:
        return self._last_step

    @property
    def last_shape(self) -> StepShape:
        """The work of the forward that returned last."""
        return self._last_shape

    def estimate(self) -> Estimate:
        return self._fit.estimate()

    def close(self) -> None:
        self._stages.close()

    def _warm_up(self) -> None:
        """A few real steps, so that the first estimate rests on measurements of this machine."""
        steps = warm_up_steps(self._limits)
        for step in steps:
            self.forward(step)
        self._fit = StepFit(_PRIOR)  # the first round also paid for first touches and bindings
        for step in steps:
            self.forward(step)
        blocks, slots = touched(self._limits)
        self._pool.blocks[:blocks] = 0
        self._pool.tails[:slots] = 0


def _budget(options: ModelOptions) -> int:
    """Bytes for sealed blocks."""
    free = memory_bytes("MemAvailable", _POOL_LIMIT_BYTES)
    return min(int(free * options.memory_fraction), _POOL_LIMIT_BYTES)
