"""Attention on one device and the FFN of every layer on another: a step is the sum of its parts."""

from pathlib import Path

import numpy as np
import pytest

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.base import ModelOptions, Segment, Simulation, StepShape
from kvmesh.backends.devices.library import load_device
from kvmesh.backends.errors import ShapeError
from kvmesh.backends.lpu.compile import CHIP, compile_ffn, compile_model
from kvmesh.backends.lpu.ffn import ffn_clock
from kvmesh.backends.lpu.program import ModelDoesNotFit
from kvmesh.backends.lpu.shapes import ModelShape, known_shapes
from kvmesh.backends.registry import open_model
from kvmesh.backends.simulated.clocks import clock_of
from kvmesh.backends.simulated.split import SplitClock

MINI = Path(__file__).parents[1] / "kvmesh/backends/bundled/mini"
SMALL = ModelShape("small", 2, 320, 4, 2, 64, 640, 640, 512)
STEP = StepShape(decode_sequences=8, context_tokens=8000, decode_context=8000)


def split(device: str = "rubin", ffn: str = "lpu-v1", **fields: object) -> SplitClock:
    clock = clock_of(Simulation(device, ffn_device=ffn, **fields), MINI, "k4v4")  # type: ignore[arg-type]
    assert isinstance(clock, SplitClock)
    return clock


@pytest.mark.parametrize("tokens", [1, 8])
def test_the_ffn_is_timed_by_its_own_program(tokens: int):
    clock = ffn_clock(SMALL)
    cycles = compile_ffn(SMALL, clock.group, tokens).execution.cycles
    assert clock.seconds(tokens) == pytest.approx(SMALL.num_layers * cycles / CHIP.clock_hz)
    assert clock.seconds(0) == 0.0


def test_the_ffn_is_the_smaller_part_of_a_layer():
    layer = compile_model(SMALL, 1, context=64, whole=False).parts[0]
    ffn = compile_ffn(SMALL, 1, 1)
    assert 0.1 * layer.execution.cycles < ffn.execution.cycles < layer.execution.cycles


def test_chips_hold_the_ffns_and_no_more():
    large = known_shapes()["llama-3.1-8b"]
    clock = ffn_clock(large)
    weights = large.num_layers * 3 * large.hidden * large.ffn
    assert weights <= clock.chips * CHIP.data_bytes < 1.5 * weights
    giant = ModelShape("giant", 2, 32768, 64, 8, 128, 131072, 1000, 512)
    with pytest.raises(ModelDoesNotFit, match="more than the 8 chips of a node hold"):
        ffn_clock(giant)


def test_a_step_is_attention_and_ffn_and_the_ways_between():
    clock, model = split(), load_shape("mini")
    whole = clock.attention.step_seconds(STEP)
    latency = 1e-5 + 7e-7  # out of the GPU's network card and into the chip's links
    size = 8 * model.hidden * 2
    ways = 2 * model.layers * (latency + size / 8.7e10)
    assert clock.hops_seconds(8) == pytest.approx(ways)
    ffn = clock.ffn_seconds(8)
    attention = clock.step_seconds(STEP) - ffn - ways
    assert 0 < attention < whole
    names = clock.attention.cost.step(clock.attention.cost.instance(work_of_step(clock))).by_name()
    moved = sum(s for name, s in names.items() if name.startswith("ffn_"))
    halved = names["norms"] / 2
    assert attention == pytest.approx(whole - moved - halved)


def work_of_step(clock: SplitClock):
    from kvmesh.backends.simulated.gpu import work_of

    return work_of(STEP)


def test_both_devices_are_paid():
    clock = split()
    rubin, chip = load_device("rubin").price, load_device("lpu-v1").price
    assert rubin is not None and chip is not None
    expected = rubin.per_hour["hyperscaler"].value + chip.per_hour["card"].value
    assert clock.device.price_per_hour == pytest.approx(expected)
    assert split(ffn="lp30").device.price_per_hour == 0.0  # not published: no price at all
    assert clock.device.simulated and clock.estimate().simulated


def test_the_estimate_is_near_the_steps():
    clock = split("b200", model="llama-3.1-8b", weights="fp8", ffn="lp30")
    for sequences, context in ((1, 1024), (16, 1024), (64, 8192)):
        total = sequences * context
        step = StepShape(decode_sequences=sequences, context_tokens=total, decode_context=total)
        assert clock.estimate().seconds(step) == pytest.approx(clock.step_seconds(step), rel=0.25)


def test_experts_are_not_compiled():
    with pytest.raises(ShapeError, match="deepseek-r1 has experts"):
        split("gb300", model="deepseek-r1", weights="nvfp4", count=8)
    assert split("gb300", "lp30", model="deepseek-r1", weights="nvfp4", count=8).ffn_seconds(8) > 0


def test_the_tokens_are_the_cpus():
    options = ModelOptions(
        num_blocks=8, num_slots=4, simulation=Simulation("rubin", ffn_device="lpu-v1")
    )
    cpu = open_model("cpu", MINI, ModelOptions(num_blocks=8, num_slots=4))
    both = open_model("simulated", MINI, options)
    segment = Segment(0, 0, np.arange(5, 95), np.arange(8, dtype=np.int32))
    assert np.array_equal(cpu.forward([segment]), both.forward([segment]))
    seconds, idle_s = both.last_step.simulated_s, both.last_step.simulated_idle_s
    assert seconds is not None and 0 < idle_s < seconds
    for each in (cpu, both):
        each.close()
