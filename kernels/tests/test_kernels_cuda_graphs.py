"""Recorded decode steps: one recording serves steps of other lengths, bit for bit."""

import numpy as np
import pytest
from cuda_cases import SPLITTING, Case, DecodeSteps, decode_case
from cuda_shim import ShimDevice, ShimError

from kvmesh.kernels.cuda.plan import PlanBuffer, decode_grid, grid_of, plan_step, upload


class CountingDevice(ShimDevice):
    captures = 0

    def capture(self, work):
        self.captures += 1
        return super().capture(work)


class RefusingDevice(ShimDevice):
    def capture(self, work):
        raise RuntimeError("no graphs here")


ORDERS = [[0, 1, 2], [3, 2, 1, 0], [2, 3, 1], [2, 1, 0, 3], [1], [0], [2]]


def test_cuda_recorded_steps_equal_launched_ones():
    device = CountingDevice()
    steps = DecodeSteps(device, decode_case())
    graphs = steps.graphs()
    for chosen in ORDERS:
        expected = steps.launched(chosen)
        assert np.isnan(expected[len(chosen) :]).all()
        found = steps.run(graphs, chosen)
        assert found is not None
        assert np.array_equal(found, expected, equal_nan=True), chosen
    assert graphs.refusal is None
    assert device.captures == 2  # sizes of 4 and of 1, each when it came for the second time


@pytest.mark.parametrize(("before", "new"), [(0, 70), (63, 1), (3, 5)])
def test_cuda_steps_of_other_kinds_have_no_recording(before, new):
    """A long piece, one that fills a block, and one of more rows than a tile."""
    case = Case("k4v4", 64, 1, 4, before=(before,), new=(new,))
    plan = plan_step(
        case.row_start, np.array(case.before, np.int64), np.zeros(1, np.int32), case.tables,
        case.group, SPLITTING,
    )  # fmt: skip
    assert DecodeSteps(ShimDevice(), decode_case()).graphs().load(plan) is None


def test_cuda_device_that_records_nothing_still_runs(caplog):
    steps = DecodeSteps(RefusingDevice(), decode_case())
    graphs = steps.graphs()
    expected = steps.launched([0, 1])
    for _ in range(2):
        assert np.array_equal(steps.run(graphs, [0, 1]), expected, equal_nan=True)
    assert graphs.refusal == "RuntimeError: no graphs here"
    assert "launched anew" in caplog.text
    assert steps.run(graphs, [0, 1]) is None


def test_plan_buffer_refuses_a_step_that_does_not_fit():
    device = ShimDevice()
    plan = DecodeSteps(device, decode_case()).load([0, 1, 2])
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
