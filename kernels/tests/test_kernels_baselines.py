"""The rivals against the figures that their papers, or exact integrals, give for them."""

import numpy as np
import pytest

from kvmesh.kernels.baselines import polar, turboquant, uniform

DIM = 128


def unit_vectors(seed: int, count: int = 8192) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, DIM))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def relative_error(method, x: np.ndarray) -> float:
    return float(((method.quantize_dequantize(x) - x) ** 2).sum() / (x**2).sum())


# On the sphere of dimension 128, with the table of the Gaussian limit (within 0.1 % of its own).
@pytest.mark.parametrize(("bits", "expected"), [(1, 0.36089), (2, 0.11600), (3, 0.03397),
                                                (4, 0.00932)])  # fmt: skip
def test_turboquant_mse_distortion(bits, expected):
    found = relative_error(turboquant.TurboQuantMse(bits), unit_vectors(bits))
    assert found == pytest.approx(expected, rel=0.01)


# d * D_prod = (pi / 2 - <y, r>^2) * D_mse(bits - 1), r the residual's direction; over many S.
@pytest.mark.parametrize(("bits", "d_mse"), [(1, 1.0), (2, 0.36089), (3, 0.11600), (4, 0.03397)])
def test_turboquant_prod_distortion_and_bias(bits, d_mse):
    x, y = unit_vectors(10 + bits, 4096), unit_vectors(20 + bits, 4096)
    errors = []
    for seed in range(1, 41, 2):
        back = turboquant.TurboQuantProd(bits, seed).quantize_dequantize(x)
        errors.append(((back - x) * y).sum(axis=1))
    found = np.array(errors)
    assert DIM * (found**2).mean() == pytest.approx((np.pi / 2 - 1 / DIM) * d_mse, rel=0.01)
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(found.size)


def test_outlier_splits_cost_what_the_paper_says():
    assert turboquant.OutlierSplit(2).bits_per_element(DIM) == 2.5
    assert turboquant.OutlierSplit(3).bits_per_element(DIM) == 3.5
    x = np.random.default_rng(3).standard_normal((2048, DIM))
    errors = [relative_error(turboquant.OutlierSplit(bits), x) for bits in (2, 3)]
    assert 0.034 < errors[0] < 0.1160 and 0.0093 < errors[1] < 0.034


def test_polarquant_error_and_bits():
    x = np.random.default_rng(4).standard_normal((4096, DIM))
    assert polar.PolarQuant().bits_per_element(DIM) == 3.875
    assert relative_error(polar.PolarQuant(), x) == pytest.approx(0.0321, rel=0.03)


def test_q4_0_error():
    x = np.random.default_rng(5).standard_normal((4096, DIM))
    assert relative_error(uniform.Q4_0(), x) == pytest.approx(0.00736, rel=0.03)


def test_e4m3_numbers_stay_and_others_round():
    assert uniform.to_e4m3(np.array([448.0, 1.125, 2**-9, 0.0, -3.5])).tolist() == [
        448.0, 1.125, 2**-9, 0.0, -3.5,
    ]  # fmt: skip
    assert uniform.to_e4m3(np.array([1e6, 1.0625, 1.19, -17.5])).tolist() == [448, 1, 1.25, -18]


@pytest.mark.parametrize(("method", "bits", "most"), [
    (uniform.Kivi(2, "key"), 3, 0.2), (uniform.Kivi(2, "value"), 3, 0.2),
    (uniform.Kivi(4, "key"), 5, 0.01), (uniform.Int8(), 8.125, 1e-4), (uniform.Fp8(), 8, 1e-3),
    (uniform.Nvfp4(), 4.5, 0.012),
])  # fmt: skip
def test_uniform_formats(method, bits, most):
    x = np.random.default_rng(6).standard_normal((2048, DIM))
    assert method.bits_per_element(DIM) == bits
    assert 0 < relative_error(method, x) < most
    assert not method.quantize_dequantize(np.zeros((32, DIM))).any()
