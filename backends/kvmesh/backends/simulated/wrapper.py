"""A model whose numbers come from a real device here, and whose time from one that is not.

The two clocks never mix: StepTimes.simulated_s is the simulated device's, all else is measured.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmesh.backends.base import (
    DeviceInfo,
    Estimate,
    ModelSpec,
    Segment,
    StepShape,
    StepTimes,
)
from kvmesh.backends.cpu.model import CpuModel
from kvmesh.backends.cpu.pool import CpuPool


class StepClock(Protocol):
    """Time on a device, by definition instead of measurement."""

    @property
    def device(self) -> DeviceInfo:
        """Of kind "simulated"."""
        ...

    def step_seconds(self, shape: StepShape) -> float: ...

    def idle_seconds(self, shape: StepShape) -> float:
        """Of step_seconds, those in which the device waits for its host."""
        ...

    def estimate(self) -> Estimate:
        """The same, linear in the shape; marked simulated."""
        ...


class SimulatedModel:
    """See base.Model. Every forward is a real one of `model`; `clock` says how long it took.

    What `model` ran before it came here, such as its warm-up, is no time of the simulated device.
    """

    def __init__(self, model: CpuModel, clock: StepClock) -> None:
        if not clock.device.simulated or not clock.estimate().simulated:
            raise ValueError(
                f"the clock of {clock.device.name!r} does not say that it is simulated"
            )
        self._model, self._clock = model, clock
        self._last_step = StepTimes()
        self._simulated_s = 0.0

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    @property
    def device(self) -> DeviceInfo:
        return self._clock.device

    @property
    def pool(self) -> CpuPool:
        return self._model.pool

    def forward(self, segments: Sequence[Segment]) -> npt.NDArray[np.float32]:
        """See base.Model.forward."""
        logits = self._model.forward(segments)
        shape = self._model.last_shape
        seconds = self._clock.step_seconds(shape)
        idle_s = self._clock.idle_seconds(shape)
        measured = self._model.last_step
        self._last_step = replace(measured, simulated_s=seconds, simulated_idle_s=idle_s)
        self._simulated_s += seconds
        return logits

    @property
    def last_step(self) -> StepTimes:
        return self._last_step

    @property
    def simulated_s(self) -> float:
        """The simulated device's time of all forwards so far."""
        return self._simulated_s

    def estimate(self) -> Estimate:
        return self._clock.estimate()

    def close(self) -> None:
        self._model.close()
