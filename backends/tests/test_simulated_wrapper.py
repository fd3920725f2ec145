"""Numbers of the CPU, time of a clock that is not there; the two are never added."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from kvmesh.backends.base import DeviceInfo, Estimate, ModelOptions, Segment, StepShape
from kvmesh.backends.cpu.model import CpuModel
from kvmesh.backends.models.loader import load_checkpoint
from kvmesh.backends.simulated.wrapper import SimulatedModel

MINI = Path(__file__).parents[1] / "kvmesh/backends/bundled/mini"
OPTIONS = ModelOptions(num_blocks=8, num_slots=4)


@dataclass
class HundredSeconds:
    """A clock whose every token takes 100 s, and which keeps what it was asked."""

    kind: str = "simulated"
    asked: list[StepShape] = field(default_factory=list)

    @property
    def device(self) -> DeviceInfo:
        return DeviceInfo("slow", self.kind, "none")  # type: ignore[arg-type]

    def step_seconds(self, shape: StepShape) -> float:
        self.asked.append(shape)
        return 100.0 * (shape.prefill_tokens + shape.decode_sequences)

    def idle_seconds(self, shape: StepShape) -> float:
        return 1.0

    def estimate(self) -> Estimate:
        return Estimate(0, 100, 100, 0, simulated=True)


def test_numbers_are_the_cpus_and_time_is_the_clocks() -> None:
    checkpoint = load_checkpoint(MINI)
    cpu, clock = CpuModel(checkpoint, OPTIONS), HundredSeconds()
    model = SimulatedModel(CpuModel(checkpoint, OPTIONS), clock)
    assert clock.asked == []  # what it ran before it was wrapped
    assert model.last_step.simulated_s is None
    table = np.arange(8, dtype=np.int32)
    for start, ids in ((0, [5, 6, 7]), (3, [8])):
        segment = Segment(0, start, np.array(ids), table)
        assert np.array_equal(model.forward([segment]), cpu.forward([segment]))
    assert clock.asked == [StepShape(3, 0, 6, 1, 3, 1, 0), StepShape(0, 1, 4, decode_context=4)]
    assert model.last_step.simulated_idle_s == 1
    assert model.last_step.simulated_s == 100
    assert model.simulated_s == 400
    assert 0 < model.last_step.total_s < 100  # measured
    assert model.estimate().simulated and model.device.simulated
    model.close()
    cpu.close()


def test_a_clock_that_claims_to_be_real_is_refused() -> None:
    model = CpuModel(load_checkpoint(MINI), OPTIONS)
    with pytest.raises(ValueError, match="does not say that it is simulated"):
        SimulatedModel(model, HundredSeconds("measured"))
    model.close()


def test_the_cpu_has_no_simulated_time() -> None:
    model = CpuModel(load_checkpoint(MINI), OPTIONS)
    model.forward([Segment(0, 0, np.array([1]), np.arange(8, dtype=np.int32))])
    assert model.last_step.simulated_s is None
    model.close()
