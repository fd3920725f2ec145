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
