"""A GPU that is not there: its steps are the cost model's, and a real one of its family wins."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.base import Backend, Model, ModelOptions, Segment, Simulation, StepShape
from kvmesh.backends.cost.parallel import Formats, Parallel
from kvmesh.backends.cost.shapes import StepWork
from kvmesh.backends.cost.step import StepCost
from kvmesh.backends.cpu.backend import CpuBackend
from kvmesh.backends.devices.library import load_device
from kvmesh.backends.errors import BackendError, BackendUnavailable, DeviceError, DoesNotFit
from kvmesh.backends.registry import create_backend, open_model
from kvmesh.backends.simulated import backend as module
from kvmesh.backends.simulated.backend import GpuFamily, SimulatedBackend
from kvmesh.backends.simulated.clocks import clock_of
from kvmesh.backends.simulated.gpu import lay_out

MINI = Path(__file__).parents[1] / "kvmesh/backends/bundled/mini"
SMALL = ModelOptions(num_blocks=8, num_slots=4)


def simulated(**fields: object) -> ModelOptions:
    simulation = Simulation(**fields)  # type: ignore[arg-type]
    return ModelOptions(num_blocks=8, num_slots=4, simulation=simulation)


def test_a_step_takes_what_the_cost_model_says():
    model = open_model("simulated", MINI, simulated(device="h100"))
    cost = StepCost(load_device("h100"), load_shape("mini"), formats=Formats("bf16", "k4v4"))
    table = np.arange(8, dtype=np.int32)
    prompt = Segment(0, 0, np.arange(5, 105), table)
    model.forward([prompt])
    assert model.last_step.simulated_s == cost.step(StepWork.of([(0, 100)])).latency_s
    decode = [Segment(0, 100, np.array([9]), table), Segment(1, 0, np.arange(9, 12), table + 4)]
    model.forward(decode)
    mixed = cost.step(StepWork.of([(0, 3)], [101]))
    assert model.last_step.simulated_s == mixed.latency_s
    assert model.last_step.simulated_idle_s == pytest.approx(mixed.by_name()["host"])
    model.close()


@pytest.mark.parametrize("name", ["simulated", "blackwell", "rubin"])
def test_the_tokens_are_the_cpus(name: str):
    cpu, model = open_model("cpu", MINI, SMALL), open_model(name, MINI, SMALL)
    segment = Segment(0, 0, np.arange(5, 95), np.arange(8, dtype=np.int32))
    assert np.array_equal(cpu.forward([segment]), model.forward([segment]))
    device = model.device
    assert device.simulated and model.estimate().simulated
    assert device.price_per_hour > 0 and device.price_source
    assert not cpu.device.simulated
    for each in (cpu, model):
        each.close()


def test_a_rack_is_priced_by_the_device_and_timed_as_one():
    one = clock_of(Simulation("rubin"), MINI, "k4v4")
    rack = clock_of(Simulation("rubin", 72), MINI, "k4v4")
    assert rack.device.count == 72
    assert rack.device.price_per_hour == one.device.price_per_hour == 3.57
    assert rack.device.memory_bytes == 72 * one.device.memory_bytes
    assert rack.device.transfer_byte_s == pytest.approx(one.device.transfer_byte_s / 72)
    busy = StepShape(decode_sequences=7200, context_tokens=7_200_000, decode_context=7_200_000)
    assert rack.step_seconds(busy) < one.step_seconds(busy) / 5


def test_another_model_s_steps_say_so_and_take_longer():
    own = clock_of(Simulation("b200"), MINI, "k4v4")
    large = clock_of(Simulation("b200", 8, "llama-3.1-70b", "fp8"), MINI, "k4v4")
    assert "timed as llama-3.1-70b" in large.device.name
    step = StepShape(decode_sequences=1, context_tokens=500, decode_context=500)
    assert large.step_seconds(step) > 5 * own.step_seconds(step)
    # A byte of this model's KV stands for as many as the other's blocks are larger.
    elements = [load_shape(name).kv_elements_per_token for name in ("llama-3.1-70b", "mini")]
    ratio = elements[0] / elements[1]
    assert large.device.transfer_byte_s * 8 / own.device.transfer_byte_s == pytest.approx(
        ratio, rel=0.2
    )


@pytest.mark.parametrize(
    ("wanted", "kind", "told"),
    [
        (Simulation("b20"), DeviceError, "did you mean 'b200'"),
        (Simulation("lpu-v1"), DeviceError, "use backend lpu"),
        (Simulation("b200", model="llama-3.1-405b"), DoesNotFit, "would hold it"),
        (Simulation("b200", weights="int2"), BackendError, "formats.weights is 'int2'"),
        (Simulation("b200", model="lama"), BackendError, "no model is named 'lama'"),
    ],
)
def test_what_cannot_be_simulated_is_named(wanted: Simulation, kind: type, told: str):
    with pytest.raises(kind, match=told):
        clock_of(wanted, MINI, "k4v4")


def test_a_backend_that_measures_refuses_to_simulate():
    with pytest.raises(BackendUnavailable, match="simulates no device"):
        CpuBackend().open(MINI, simulated(device="b200"))


def test_an_lpu_is_timed_as_another_model_and_refuses_the_rest():
    own, timed = (
        open_model("lpu", MINI, SMALL),
        open_model("lpu", MINI, simulated(model="mistral-7b")),
    )
    assert timed.device.name.endswith("timed as mistral-7b") and timed.device.count > 30
    step = StepShape(decode_sequences=1, context_tokens=100)
    assert timed.estimate().seconds(step) > 10 * own.estimate().seconds(step)
    for each in (own, timed):
        each.close()
    with pytest.raises(BackendUnavailable, match="takes the model alone"):
        open_model("lpu", MINI, simulated(device="b200"))


@pytest.mark.parametrize(
    ("model", "count", "parallel"),
    [
        ("llama-3.1-70b", 8, Parallel(tensor=8)),
        ("llama-3.1-70b", 72, Parallel(tensor=8, data=9)),
        ("deepseek-r1", 64, Parallel(data=64, expert=64)),
        ("deepseek-r1", 1, Parallel()),
    ],
)
def test_layout_of_a_rack(model: str, count: int, parallel: Parallel):
    assert lay_out(load_shape(model), count) == parallel


class RealGpu:
    """Stands for the CUDA backend: runs here, or says why not."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason

    def probe(self) -> str | None:
        return self.reason

    def open(self, path: Path, options: ModelOptions) -> Model:
        raise AssertionError("not opened here")


def family(gpus: tuple[str, ...], cuda: Callable[[], Backend]) -> GpuFamily:
    return GpuFamily("b200", frozenset({"100", "103"}), lambda: gpus, cuda)


def test_a_real_gpu_of_the_family_runs_instead():
    real = RealGpu()
    assert family(("90", "103"), lambda: real).select(Simulation()) is real


@pytest.mark.parametrize("gpus", [(), ("90",), ("107", "120")])
def test_without_one_of_the_family_it_is_simulated(gpus: tuple[str, ...]):
    def never() -> Backend:
        raise AssertionError("the CUDA backend was asked for")

    assert isinstance(family(gpus, never).select(Simulation()), SimulatedBackend)


def test_a_rack_or_another_model_is_simulated_even_where_a_gpu_is():
    chosen = family(("100",), RealGpu).select(Simulation(count=8))
    assert isinstance(chosen, SimulatedBackend)


def test_a_gpu_that_cannot_be_used_is_simulated_and_said(caplog: pytest.LogCaptureFixture):
    chosen = family(("100",), lambda: RealGpu("the driver is too old")).select(Simulation())
    assert isinstance(chosen, SimulatedBackend)
    assert "the driver is too old" in caplog.text

    def absent() -> Backend:
        raise BackendUnavailable("no backend is named 'cuda'")

    assert isinstance(family(("100",), absent).select(Simulation()), SimulatedBackend)
    assert "no backend is named 'cuda'" in caplog.text


def test_the_named_families_ask_this_machine(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(module, "_cuda", lambda: asked.append("cuda") or RealGpu())
    monkeypatch.setattr(module, "visible_gpus", lambda: ("107",))
    rubin, blackwell = create_backend("rubin"), create_backend("blackwell")
    assert isinstance(rubin, GpuFamily) and isinstance(blackwell, GpuFamily)
    assert isinstance(rubin.select(Simulation()), RealGpu)
    assert isinstance(blackwell.select(Simulation()), SimulatedBackend)
    assert asked == ["cuda"]
