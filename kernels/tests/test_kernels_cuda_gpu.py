"""The same cases on a real GPU: skipped, with the reason, where there is none."""

import pytest

from kvmesh.kernels.cuda.plan import Splitting
from kvmesh.kernels.cuda.step import Rule


def _gpu():
    """(a device, why there is none)"""
    try:
        from kvmesh.kernels.cuda.device import CupyDevice

        return CupyDevice(), ""
    except Exception as error:  # CuPy's own classes cannot be named where it is not installed
        return None, f"no CUDA device: {type(error).__name__}: {error}"


DEVICE, REASON = _gpu()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE is None, reason=REASON)]


@pytest.mark.parametrize("codec", ["k4v4", "k4v3", "k3v3", "k3v2", "k2v2", "k8v8", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 192, 256])
def test_gpu_seals_as_the_reference_and_attends(codec, dim):
    from cuda_cases import Case, worst_error

    case = Case(codec, dim, before=(0, 130, 1000), new=(70, 3, 1))
    found = case.run(device=DEVICE)
    assert (found.blocks[case.tables[0, 0]] == case.sealed(0, 0)).all()
    assert worst_error(found.out, case.expected(Rule())[0]) <= 2e-3


@pytest.mark.parametrize("most", [2, 8, 64])
def test_gpu_splits_change_nothing_but_rounding(most):
    from cuda_cases import Case, worst_error

    case = Case("k4v4", 128, 2, 4, before=(64 * 40 + 5,), new=(4,))
    whole = case.run(splitting=Splitting(1), device=DEVICE).out
    assert worst_error(case.run(splitting=Splitting(most, 1), device=DEVICE).out, whole) <= 1e-5


def test_gpu_recorded_steps_equal_launched_ones():
    import numpy as np
    from cuda_cases import DecodeSteps, decode_case

    steps = DecodeSteps(DEVICE, decode_case())
    graphs = steps.graphs()
    for chosen in ([0, 1, 2], [3, 2, 1, 0], [2, 3, 1], [2, 1, 0, 3], [1], [0], [2]):
        expected = steps.launched(chosen)
        assert np.array_equal(steps.run(graphs, chosen), expected, equal_nan=True), chosen
    assert graphs.refusal is None


def test_gpu_checks_moves_and_streams_blocks():
    import numpy as np
    from cuda_cases import Case

    from kvmesh.kernels.cuda.slots import BlockSlots
    from kvmesh.kernels.cuda.stream import Streams

    case = Case("k4v4", 128, before=(0,), new=(64,))
    data = case.sealed(0, 0).tobytes()
    slots = BlockSlots(DEVICE, case.layout, 40)
    for slot in range(40):
        slots.write(slot, data)
    slots.verify(range(40))
    assert slots.read(range(40)) == [data] * 40
    source = DEVICE.put(np.resize(np.arange(256, dtype=np.uint8), 1 << 20))
    target = DEVICE.zeros((1 << 20,), np.uint8)
    Streams(DEVICE).copy(target, source)
    assert np.array_equal(DEVICE.get(target), DEVICE.get(source))


def test_gpu_tells_its_name_and_the_time_that_passes():
    facts = DEVICE.describe()
    assert facts.name and facts.architecture.startswith("sm_")
    assert 0 < facts.free_bytes <= facts.memory_bytes
    first = DEVICE.timer.mark()
    DEVICE.zeros((1 << 20,), "uint8")
    assert DEVICE.timer.seconds(first, DEVICE.timer.mark()) >= 0
