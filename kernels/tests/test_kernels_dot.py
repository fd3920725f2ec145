"""Every instruction set computes the same integers, those of NumPy."""

import functools
import itertools

import numba
import numpy as np
import pytest

from kvmesh.kernels import codebook, reference
from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.dot import make_dot

PATHS = [*simd.available(), "emulated"]


@functools.cache
def compiled(path):
    dot = make_dot(path)

    @numba.njit
    def run(*arguments):
        dot(*arguments)

    return run


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_computes_the_same_integers(path, bits):
    rng = np.random.default_rng(bits)
    shapes = ((32, 64), (48, 64), (256, 64), (64, 16), (64, 80), (64, 256))
    for (length, lanes), rows in itertools.product(shapes, (1, 2, 4, 7)):
        codes = rng.integers(0, 1 << bits, (1, length, lanes)).astype(np.uint8)
        weights = rng.integers(-simd.LARGEST, simd.LARGEST + 1, (rows, length)).astype(np.int16)
        weights[0] = simd.LARGEST
        high = ((weights.astype(np.int32) + 128) >> 8).astype(np.int8)
        low = (weights - 256 * high.astype(np.int32)).astype(np.int8)
        wide = np.ascontiguousarray(weights.reshape(rows, -1, 4)[..., simd.ORDER])
        plane = reference.pack(codes, bits).reshape(-1)
        out = np.full((rows + 1, lanes + 16), -1, np.int32)
        places = (x.ctypes.data for x in (plane, wide, high, low, out))
        compiled(path)(bits, *places, rows, length, lanes, lanes + 16)
        assert (out[rows] == -1).all() and (out[:, lanes:] == -1).all()
        out = out[:rows, :lanes]
        u = codebook.grid(bits)[codes[0]].astype(np.int64)
        np.testing.assert_array_equal(out, (weights.astype(np.int64) @ u).astype(np.int32))
        centered = 2 * out - np.int32(255) * weights.sum(axis=1, dtype=np.int32)[:, None]
        np.testing.assert_array_equal(centered, weights.astype(np.int64) @ (2 * u - 255))
