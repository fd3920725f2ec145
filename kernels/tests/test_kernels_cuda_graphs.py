"""Recorded decode steps: one recording serves steps of other lengths, bit for bit."""

import numpy as np
import pytest
from cuda_cases import Case
from cuda_shim import ShimDevice, ShimError

from kvmesh.kernels.cuda.graphs import DecodeGraphs
from kvmesh.kernels.cuda.plan import (
    HostPlan,
    PlanBuffer,
    Splitting,
    decode_grid,
    grid_of,
    plan_step,
    upload,
)
from kvmesh.kernels.cuda.step import StepKernels

SPLITTING = Splitting(3, 1)


class CountingDevice(ShimDevice):
    captures = 0

    def capture(self, work):
        self.captures += 1
        return super().capture(work)


class RefusingDevice(ShimDevice):
    def capture(self, work):
        raise RuntimeError("no graphs here")


def a_case() -> Case:
    return Case("k4v4", 64, 1, 4, before=(200, 75, 10, 131), new=(1, 1, 1, 1), seed=3)


class Steps:
    """Decode steps of some of a case's sequences, on buffers that stay."""

    def __init__(self, device: ShimDevice, case: Case) -> None:
        self.device, self.case = device, case
        self.memory = case.memory(device)
        self.qkv = tuple(
            device.zeros((8, *shape[1:]), np.float32)
            for shape in (case.q.shape, case.rows(case.keys).shape, case.rows(case.values).shape)
        )
        self.out = device.zeros((8, *case.q.shape[1:]), np.float32)

    def kernels(self) -> StepKernels:
        return StepKernels(self.device, self.case.layout, self.memory, SPLITTING)

    def load(self, chosen: list[int]) -> HostPlan:
        case = self.case
        arrays = (case.q, case.rows(case.keys), case.rows(case.values))
        for target, source in zip(self.qkv, arrays, strict=True):
            target[: len(chosen)] = source[chosen]
        width = 1 + max(case.before[each] // 64 for each in chosen)
        return plan_step(
            np.arange(len(chosen) + 1, dtype=np.int32),
            np.array([case.before[each] for each in chosen], np.int64),
            np.array(chosen, np.int32), case.tables[chosen][:, :width], case.group, SPLITTING,
        )  # fmt: skip

    def launched(self, chosen: list[int]) -> np.ndarray:
        plan = upload(self.device, self.load(chosen))
        self.kernels().run_layer(plan, 0, self.qkv, self.out)
        return self.out[: len(chosen)].copy()


ORDERS = [[0, 1, 2], [3, 2, 1, 0], [2, 3, 1], [2, 1, 0, 3], [1], [0], [2]]


def test_cuda_recorded_steps_equal_launched_ones():
    device = CountingDevice()
    steps = Steps(device, a_case())
    graphs = DecodeGraphs(device, steps.kernels(), steps.qkv, steps.out, SPLITTING)
    for chosen in ORDERS:
        expected = steps.launched(chosen)
        steps.out[...] = np.nan
        run = graphs.load(steps.load(chosen))
        assert run is not None
        run(0)
        assert np.array_equal(steps.out[: len(chosen)], expected), chosen
        assert np.isnan(steps.out[len(chosen) :]).all(), "a replay writes beyond its step"
    assert graphs.refusal is None
    assert device.captures == 2  # sizes of 4 and of 1, each when it came for the second time


def test_cuda_steps_without_a_recording_are_told():
    case = Case("k4v4", 64, 1, 4, before=(0, 63, 3), new=(70, 1, 5))
    device = ShimDevice()
    steps = Steps(device, a_case())
    graphs = DecodeGraphs(device, steps.kernels(), steps.qkv, steps.out, SPLITTING)
    for sequence, fits in ((0, False), (1, False), (2, False)):
        plan = plan_step(
            np.array([0, case.new[sequence]], np.int32),
            np.array([case.before[sequence]], np.int64),
            np.zeros(1, np.int32), case.tables[[sequence]], 4, SPLITTING,
        )  # fmt: skip
        assert (graphs.load(plan) is not None) == fits, sequence


def test_cuda_device_that_records_nothing_still_runs(caplog):
    device = RefusingDevice()
    steps = Steps(device, a_case())
    graphs = DecodeGraphs(device, steps.kernels(), steps.qkv, steps.out, SPLITTING)
    expected = steps.launched([0, 1])
    for _ in range(2):
        steps.out[...] = np.nan
        run = graphs.load(steps.load([0, 1]))
        assert run is not None
        run(0)
        assert np.array_equal(steps.out[:2], expected)
    assert graphs.refusal == "RuntimeError: no graphs here"
    assert "launched anew" in caplog.text
    assert graphs.load(steps.load([0, 1])) is None


def test_plan_buffer_refuses_a_step_that_does_not_fit():
    device = ShimDevice()
    plan = Steps(device, a_case()).load([0, 1, 2])
    for grid in (decode_grid(2, 8, SPLITTING), decode_grid(4, 2, SPLITTING)):
        with pytest.raises(ValueError, match="does not fit"):
            PlanBuffer(device, grid).load(plan)
    buffer = PlanBuffer(device, decode_grid(4, 8, SPLITTING))
    buffer.load(plan)
    exact = upload(device, plan)
    assert exact.grid == grid_of(plan)
    for name in ("row_start", "start", "slot", "token_segment", "token_part", "decode"):
        found, expected = getattr(buffer.plan, name), getattr(exact, name)
        assert np.array_equal(found[: len(expected)], expected), name
    assert np.array_equal(buffer.plan.tables[:3, : exact.grid.table_width], exact.tables)
    assert buffer.plan.num_tokens.tolist() == [3] and buffer.plan.num_decode.tolist() == [3]


def test_shim_records_launches_and_nothing_else():
    device = ShimDevice()
    array = device.zeros((4,), np.float32)
    for forbidden in (
        lambda: device.zeros((1,), np.int32),
        lambda: device.write(array, np.ones(4, np.float32)),
        lambda: device.get(array),
    ):
        with pytest.raises(ShimError, match="recorded"):
            device.capture(forbidden)
    device.write(array, np.ones(4, np.float32))
    assert device.get(array).tolist() == [1, 1, 1, 1]
