"""A model on a CUDA device: dense stages in ONNX Runtime, attention over the pool in kernels."""

import time
from collections.abc import Callable, Sequence
from typing import Any

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
from kvmesh.backends.cost.price import listed_price
from kvmesh.backends.cuda.pool import DevicePool
from kvmesh.backends.cuda.stages import DeviceStages, providers
from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.loader import Checkpoint
from kvmesh.backends.models.spec import model_spec
from kvmesh.backends.ort import SessionOptions
from kvmesh.backends.pool import count_blocks
from kvmesh.backends.steps import FlatStep, StepLimits, flatten
from kvmesh.backends.warmup import touched, warm_up_steps
from kvmesh.kernels.cuda.device import Device
from kvmesh.kernels.cuda.graphs import DecodeGraphs
from kvmesh.kernels.cuda.plan import HostPlan, Splitting, plan_step, upload
from kvmesh.kernels.cuda.step import Memory, Rule, StepKernels
from kvmesh.kernels.errors import CodecError

# Proportions of a small model on one GPU; its own steps soon set the magnitudes.
_PRIOR = Estimate(1e-3, 2e-6, 2e-5, 1e-9)
_WARM_UP_ROUNDS = 2  # the first loads kernels and the second records them: neither is a measurement


class CudaModel:
    """See base.Model. splitting: of a row's context. warm: run a few steps first, else the estimate
    is a guess and the first steps load the kernels. clock: seconds of the host, monotonic."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: ModelOptions,
        device: Device,
        splitting: Splitting | None = None,
        warm: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config = checkpoint.config
        self._device = device
        self._clock = clock
        self._splitting = splitting or Splitting()
        self._group = config.num_heads // config.num_kv_heads
        self._spec = model_spec(checkpoint, options)
        layout = self._spec.layout
        sessions = SessionOptions(options.threads, options.spin, providers(device.place))
        self._stages = DeviceStages(device, checkpoint, options.max_step_tokens, sessions)
        # Of the memory that the weights left.
        budget = int(device.describe().free_bytes * options.memory_fraction)
        num_blocks = count_blocks(layout, config.max_context, options, budget)
        self._pool = DevicePool(device, layout, num_blocks, options.num_slots)
        self._limits = StepLimits(
            vocab_size=config.vocab_size,
            max_context=config.max_context,
            max_tokens=options.max_step_tokens,
            num_blocks=num_blocks,
            num_slots=options.num_slots,
        )
        self._kernels, self._graphs = self._attention(checkpoint)
        self._fit = StepFit(_PRIOR)
        self._last_step, self._last_shape = StepTimes(), StepShape()
        try:
            if warm:
                self._warm_up()
        except CodecError as error:
            self.close()
            raise CheckpointError(
                f"{checkpoint.root}: computes no finite K and V: {error}"
            ) from error

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def device(self) -> DeviceInfo:
        facts = self._device.describe()
        price = listed_price(facts.name)
        return DeviceInfo(
            name=facts.name,
            kind="measured",
            architecture=facts.architecture,
            memory_bytes=facts.memory_bytes,
            bandwidth_bytes_s=facts.bandwidth_bytes_s,
            price_per_hour=price.per_hour if price else 0.0,
            price_source=f"{price.preset}: {price.source}" if price else "",
        )

    @property
    def pool(self) -> DevicePool:
        return self._pool

    def forward(self, segments: Sequence[Segment]) -> npt.NDArray[np.float32]:
        """See base.Model.forward."""
        began = self._clock()
        step = flatten(segments, self._limits)
        plan = plan_step(
            step.row_start, step.start, step.slot, step.tables, self._group, self._splitting
        )
        self._stages.load(step.ids, step.positions)
        seal_s = self._run_layers(step, plan)
        logits = self._stages.logits(step.wanted)
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

    @property
    def graph_refusal(self) -> str | None:
        """Why decode steps are launched anew each time; None if they are recorded and replayed."""
        return self._graphs.refusal

    def estimate(self) -> Estimate:
        return self._fit.estimate()

    def close(self) -> None:
        self._stages.close()
        self._pool.close()

    def _attention(self, checkpoint: Checkpoint) -> tuple[StepKernels, DecodeGraphs]:
        """For steps that are launched, and for those that are recorded."""
        device, stages, pool = self._device, self._stages, self._pool
        memory = Memory(pool.blocks, pool.tails, device.put(checkpoint.centers))
        launched, recorded = (
            StepKernels(device, pool.layout, memory, self._splitting) for _ in range(2)
        )
        graphs = DecodeGraphs(device, recorded, stages.qkv, stages.attention, self._splitting)
        return launched, graphs

    def _run_layers(self, step: FlatStep, plan: HostPlan) -> float:
        """Every stage but the last, with its layer's attention. Returns the seconds of sealing."""
        tokens = len(step.ids)
        replay = self._graphs.load(plan)
        if replay is not None:
            for layer in range(self._stages.last):
                self._stages.run(layer, tokens)
                replay(layer)
            return 0.0
        launched = _LaunchedStep(self._device, self._kernels, plan)
        for layer in range(self._stages.last):
            self._stages.run(layer, tokens)
            launched.run(layer, self._stages.qkv, self._stages.attention)
        return launched.finish()

    def _warm_up(self) -> None:
        """A few real steps, so that the first estimate rests on measurements of this machine."""
        steps = warm_up_steps(self._limits)
        for _ in range(_WARM_UP_ROUNDS):
            for step in steps:
                self.forward(step)
        self._fit = StepFit(_PRIOR)
        for step in steps:
            self.forward(step)
        self._pool.clear(*touched(self._limits))


class _LaunchedStep:
    """The attention of one step, launch by launch, with the device's time of its sealing."""

    def __init__(self, device: Device, kernels: StepKernels, plan: HostPlan) -> None:
        self._device, self._kernels = device, kernels
        self._plan = upload(device, plan)
        self._fills = len(plan.filled) > 0
        self._spans: list[tuple[Any, Any]] = []

    def run(self, layer: int, qkv: tuple[Any, Any, Any], out: Any) -> None:
        self._timed(lambda: self._kernels.seal(self._plan, layer, qkv[1:]))
        self._kernels.attend(self._plan, layer, qkv, out, Rule())
        self._kernels.append(self._plan, layer, qkv[1:])

    def finish(self) -> float:
        """Completes the blocks that filled. Raises CodecError; returns the seconds of sealing."""
        self._timed(lambda: self._kernels.finish(self._plan))
        return sum(self._device.timer.seconds(*span) for span in self._spans)

    def _timed(self, work: Callable[[], None]) -> None:
        if not self._fills:
            return
        first = self._device.timer.mark()
        work()
        self._spans.append((first, self._device.timer.mark()))
