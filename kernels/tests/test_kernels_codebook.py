"""The tables against the published numbers, and the codec's error against theory."""

import itertools

import numpy as np
import pytest

from kvmesh.kernels import codebook, reference, rotation
from kvmesh.kernels.errors import CodecError

PUBLISHED = {  # Max 1960, table I
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
NO_CENTER = np.zeros(128, np.float32)


def unit_vectors(seed: int, count: int, dim: int = 128) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def distortion(levels: np.ndarray) -> float:
    """Mean squared error of N(0, 1) under the nearest of these levels, by the trapezoid rule."""
    z = np.linspace(-9, 9, 400_001)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    error = np.min([(z - level) ** 2 for level in levels], axis=0)
    return float(np.sum(error * density) * (z[1] - z[0]))


def cell_means(positive: np.ndarray) -> np.ndarray:
    """The mean of N(0, 1) between the midpoints around each level, by the trapezoid rule."""
    borders = [0.0, *((positive[1:] + positive[:-1]) / 2), 12.0]
    means = []
    for low, high in itertools.pairwise(borders):
        z = np.linspace(low, high, 100_001)
        density = np.exp(-z * z / 2)
        means.append(np.trapezoid(z * density, z) / np.trapezoid(density, z))
    return np.array(means)


@pytest.mark.parametrize(("bits", "cost"), [(1, 2e-5), (2, 2e-5), (3, 2e-5), (4, 4.6e-4)])
def test_levels_are_lloyd_max_on_a_grid(bits, cost):
    computed = np.array(codebook.lloyd_max(bits))
    half = 1 << (bits - 1)
    frozen = codebook.levels(bits)
    np.testing.assert_allclose(frozen[:half], computed, atol=codebook.step(bits) / 2)
    np.testing.assert_array_equal(frozen[half:], -frozen[:half])
    np.testing.assert_allclose(computed, PUBLISHED[bits], rtol=4e-4)
    np.testing.assert_allclose(computed, cell_means(computed), atol=1e-5)
    best = distortion(np.concatenate((computed, -computed)))
    assert distortion(frozen) <= best * (1 + cost)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_levels_are_bytes_and_exact(bits):
    grid = codebook.grid(bits).astype(np.float64)
    assert len(set(grid)) == 1 << bits
    exact = (grid - codebook.GRID_MIDDLE) * codebook.step(bits)
    np.testing.assert_array_equal(codebook.levels(bits).astype(np.float64), exact)
    assert codebook.step(bits) * 65536 % 1 == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_stored_code_is_nearest_level(bits):
    z = np.linspace(-4, 4, 10_001).astype(np.float32)
    passed = np.searchsorted(codebook.thresholds(bits), z, side="left")
    level = codebook.levels(bits)[codebook.stored_codes(bits)[passed]]
    nearest = np.abs(z[:, None] - codebook.levels(bits)).min(axis=1)
    np.testing.assert_allclose(np.abs(z - level), nearest, atol=1e-6)


def test_rotation_is_orthogonal_and_signs_are_mixed():
    for dim in (32, 64, 128, 256):
        signs = rotation.signs(dim)
        r = rotation.hadamard(np.eye(dim)) * signs / np.sqrt(dim)
        np.testing.assert_allclose(r @ r.T, np.eye(dim), atol=1e-12)
        assert set(signs) == {-1.0, 1.0} and abs(signs.sum()) < dim / 2


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1186), (3, 0.0338), (4, 0.0091)])
def test_squared_error_of_values(bits, expected):
    u = unit_vectors(1, 8192)
    codes, scales = reference.encode(u, NO_CENTER, "value", bits)
    error = ((reference.decode(codes, scales, NO_CENTER, bits) - u) ** 2).sum(axis=1).mean()
    assert error == pytest.approx(expected, rel=0.01)
    assert error < 2.72 * 4.0**-bits


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1160), (3, 0.0340), (4, 0.00932)])
def test_squared_error_of_the_codes(bits, expected):
    """With the plain norm as scale, the paper's D_mse."""
    u = unit_vectors(2, 8192)
    codes, _ = reference.encode(u, NO_CENTER, "value", bits)
    plain = np.full(len(u), 1 / np.sqrt(128))
    coded = codebook.levels(bits)[codes] * plain[:, None]
    back = rotation.hadamard(coded) * rotation.signs(128) / np.sqrt(128)
    assert ((back - u) ** 2).sum(axis=1).mean() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("bits", [3, 4])
def test_keys_are_unbiased(bits, rho):
    u, other = unit_vectors(3, 16_000), unit_vectors(4, 16_000)
    other -= (other * u).sum(axis=1, keepdims=True) * u
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    y = rho * u + np.sqrt(1 - rho**2) * other
    codes, scales = reference.encode(u, NO_CENTER, "key", bits)
    error = (y * (reference.decode(codes, scales, NO_CENTER, bits) - u)).sum(axis=1)
    assert abs(error.mean()) < 1e-3
    if (bits, rho) == (3, 0.3):
        assert 128 * error.var() == pytest.approx(0.0323, rel=0.05)


def test_zero_has_code_zero_and_scale_zero():
    mu = np.random.default_rng(5).standard_normal(64).astype(np.float32)
    for kind in ("key", "value"):
        codes, scales = reference.encode(mu[None], mu, kind)
        assert not codes.any() and not scales.any()
        np.testing.assert_array_equal(reference.decode(codes, scales, mu)[0], mu)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_reference_refuses_what_is_not_finite(bad):
    x = np.ones((2, 64), np.float32)
    x[1, 7] = bad
    with pytest.raises(CodecError, match="keys hold a NaN or an infinity"):
        reference.encode(x, np.zeros(64, np.float32), "key")
