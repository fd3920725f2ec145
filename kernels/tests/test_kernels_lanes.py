"""Arithmetic on lanes against NumPy, and whole attention forced through each instruction set."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from kvmesh.kernels.cpu import lanes, simd, softmax, vectors


@numba.njit
def soften(scores, peak):
    top = lanes.largest(scores.ctypes.data, peak)
    return top, lanes.exponents(scores.ctypes.data, top)


@numba.njit
def score(dots, scales, unit, units, offsets, biases, scores):
    softmax.score_rows(
        dots.ctypes.data, dots.shape[1], scales.ctypes.data, unit, units.ctypes.data,
        offsets.ctypes.data, biases.ctypes.data, scores.ctypes.data,
    )  # fmt: skip


@numba.njit
def score_and_weigh(dots, scales, query, value_scales, state, weights):
    unit, units, offsets, biases = query
    peak, total, fades = state
    wide, high, low, rounded_unit, offset = weights
    softmax.score_and_weigh_rows(
        dots.ctypes.data, dots.shape[1], scales.ctypes.data, unit, units.ctypes.data,
        offsets.ctypes.data, biases.ctypes.data, value_scales.ctypes.data, peak.ctypes.data,
        total.ctypes.data, fades.ctypes.data, wide.ctypes.data, high.ctypes.data, low.ctypes.data,
        rounded_unit.ctypes.data, offset.ctypes.data,
    )  # fmt: skip


@numba.njit
def powers(x, out):
    for i in range(x.size):
        out[i] = vectors.exp2(x[i])


@numba.njit
def accumulate(dots, mixed, count, unit, units, offsets, fades):
    lanes.accumulate(
        dots.ctypes.data, dots.shape[1], mixed.ctypes.data, mixed.shape[1], count, unit,
        units.ctypes.data, offsets.ctypes.data, fades.ctypes.data,
    )  # fmt: skip


@numba.njit
def rounded(x, wide, high, low, unit, offset):
    lanes.round_row(
        x.ctypes.data, x.size, wide.ctypes.data, high.ctypes.data, low.ctypes.data,
        unit.ctypes.data, offset.ctypes.data,
    )  # fmt: skip


@numba.njit
def weigh(scores, scales, peak, total, fades, wide, high, low, unit, offset):
    softmax.weigh_rows(
        scores.ctypes.data, scales.ctypes.data, peak.ctypes.data, total.ctypes.data,
        fades.ctypes.data, wide.ctypes.data, high.ctypes.data, low.ctypes.data, unit.ctypes.data,
        offset.ctypes.data,
    )  # fmt: skip


def test_a_row_of_scores_becomes_powers():
    rng = np.random.default_rng(0)
    scores = (9 * rng.standard_normal(64)).astype(np.float32)
    for peak in (-np.inf, 3.0, 100.0):
        weights = scores.copy()
        top, total = soften(weights, np.float32(peak))
        assert top == max(scores.max(), np.float32(peak))
        exact = np.exp2(np.maximum(scores.astype(np.float64) - np.float64(top), -100))
        np.testing.assert_allclose(weights, exact, rtol=3e-6)
        halved = weights.copy()
        while halved.size > 1:
            halved = halved[: halved.size // 2] + halved[halved.size // 2 :]
        assert total == halved[0]
        alone = np.zeros(64, np.float32)
        powers(scores - np.float32(top), alone)
        np.testing.assert_array_equal(alone, weights)


def some_dots(rng):
    """Dots of four rows, fp16 scales with the smallest and the largest, and what a query has."""
    scales = (rng.random(64) * 10.0 ** rng.integers(-7, 4, 64)).astype(np.float16)
    scales[:3] = 0, 6e-8, 65504
    dots = rng.integers(-1000, 1000, (4, 80)).astype(np.int32)
    units, biases = (rng.random((2, 4)) / 1000).astype(np.float32)
    return dots, scales, (np.float32(0.5), units, np.arange(4, dtype=np.int32), biases)


def test_scores_of_four_rows():
    dots, scales, (unit, units, offsets, biases) = some_dots(np.random.default_rng(2))
    scores = np.zeros((4, 64), np.float32)
    score(dots, scales.view(np.uint16), unit, units, offsets, biases, scores)
    whole = (2 * dots[:, :64] - offsets[:, None]).astype(np.float32) * (units * unit)[:, None]
    exact = biases[:, None] + whole.astype(np.float64) * scales.astype(np.float64)
    np.testing.assert_array_equal(scores, exact.astype(np.float32))


def test_scoring_and_weighing_in_one_go_is_the_same():
    rng = np.random.default_rng(3)
    dots, scales, query = some_dots(rng)
    scales = scales.view(np.uint16)  # Numba does not know the other type
    value_scales = rng.random(64).astype(np.float16).view(np.uint16)

    def arrays():
        state = np.array([3, -np.inf, 0, 90], "f4"), np.array([1, 0, 2, 3], "f4"), np.zeros(4, "f4")
        shapes = ("i2", (4, 64)), ("i1", (4, 64)), ("i1", (4, 64)), ("f4", 4), ("i4", 4)
        return state, tuple(np.zeros(shape, kind) for kind, shape in shapes)

    (state, weights), (other_state, other_weights) = arrays(), arrays()
    score_and_weigh(dots, scales, query, value_scales, state, weights)
    scores = np.zeros((4, 64), np.float32)
    score(dots, scales, *query, scores)
    weigh(scores, value_scales, *other_state, *other_weights)
    for found, wanted in zip((*state, *weights), (*other_state, *other_weights), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert state[0][1] == scores[1].max()


def test_powers_of_two_are_within_two_ulp():
    x = -np.linspace(0, 99, 100_001).astype(np.float32)
    found = np.zeros_like(x)
    powers(x, found)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(found / exact - 1).max() <= 2 * 2.0**-23
    powers(np.array([-np.inf, -1000], np.float32), found[:2])
    assert (found[:2] == np.float32(2.0**-100)).all()


def test_accumulate():
    rng = np.random.default_rng(1)
    unit, (units, fades) = np.float32(0.25), rng.random((2, 4)).astype(np.float32)
    offsets = np.arange(4, dtype=np.int32)
    for size in (32, 80, 256):
        dots = rng.integers(-1000, 1000, (4, 256)).astype(np.int32)
        mixed = rng.standard_normal((4, size)).astype(np.float32)
        more = (2 * dots[:, :size] - offsets[:, None]).astype(np.float32) * (units * unit)[:, None]
        want = (mixed.astype(np.float64) * fades[:, None] + more).astype(np.float32)
        want[3] = mixed[3]  # beyond the count
        accumulate(dots, mixed, 3, unit, units, offsets, fades)
        np.testing.assert_array_equal(mixed, want)


def whole_weights(wide, high, low):
    """The integers that a row of weights is, in the form that this CPU takes."""
    if simd.PATHS[simd.CHOSEN].split:
        return 256 * high.astype(np.int32) + low
    return wide.reshape(-1, 4)[:, np.argsort(simd.ORDER)].reshape(-1).astype(np.int32)


@pytest.mark.parametrize("size", [32, 64, 80, 256])
def test_rounding_to_weights(size):
    rng = np.random.default_rng(size)
    x = rng.standard_normal(size).astype(np.float32)
    for factor in (np.float32(1), np.float32(2.0**-110)):
        wide, unit, offset = np.zeros(size, np.int16), np.zeros(1, np.float32), np.zeros(1, "i4")
        high, low = np.zeros(size, np.int8), np.zeros(size, np.int8)
        rounded(x * factor, wide, high, low, unit, offset)
        whole = whole_weights(wide, high, low)
        assert offset[0] == 255 * whole.sum()
        if factor < 1:
            assert not whole.any()  # too small to matter: zeros
            continue
        assert np.abs(whole).max() == simd.LARGEST
        np.testing.assert_allclose(whole * unit[0], x, atol=0.51 * float(unit[0]))


def test_four_rows_of_softmax_at_once():
    """One goes on, one finds a larger score, one sees its first tokens, and one sees none yet."""
    rng = np.random.default_rng(6)
    scores = (4 * rng.standard_normal((4, 64))).astype(np.float32)
    scores[2, 40:] = scores[3] = -np.inf
    scales = rng.random(64).astype(np.float16)
    before = np.array([50, -60, -np.inf, -np.inf], np.float32)
    peak, total = before.copy(), np.array([7, 8, 0, 0], np.float32)
    fades, unit, offset = np.zeros(4, "f4"), np.zeros(4, "f4"), np.zeros(4, "i4")
    wide, high, low = np.zeros((4, 64), "i2"), np.zeros((4, 64), "i1"), np.zeros((4, 64), "i1")
    weigh(scores.copy(), scales.view(np.uint16), peak, total, fades, wide, high, low, unit, offset)
    np.testing.assert_array_equal(peak, np.maximum(before, scores.max(axis=1)))
    wholes = [whole_weights(wide[row], high[row], low[row]) for row in range(4)]
    np.testing.assert_array_equal(offset, [255 * whole.sum() for whole in wholes])
    assert not wholes[3].any() and total[3] == unit[3] == 0
    for row, kept in enumerate((7.0, 8 * 2.0**-100, 0.0)):
        powers = np.exp2(np.maximum(scores[row].astype(np.float64) - peak[row], -100))
        np.testing.assert_allclose(total[row], kept + powers.sum(), rtol=1e-6)
        found = wholes[row] * np.float64(unit[row])
        wanted = powers * scales.astype(np.float64)
        np.testing.assert_allclose(found, wanted, atol=0.51 * float(unit[row]))
    assert fades[0] == 1


_WHOLE = """
import hashlib, numpy as np
from kvmesh.kernels import reference
from kvmesh.kernels.cpu.decode import attend_decode
from kvmesh.kernels.cpu.decode_inputs import Cache, Masking, Queries
from kvmesh.kernels.layout import KvLayout
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for codec in ("k4v4", "k3v2", "k8v8"):
    layout = KvLayout(1, 2, 80, codec, bytes(16))
    centers = rng.standard_normal((2, 2, 80)).astype(np.float32)
    blocks = np.zeros((3, layout.block_bytes), np.uint8)
    for block in blocks:
        kv = tuple(rng.standard_normal((64, 2, 80)).astype(np.float32) for _ in range(2))
        reference.seal_layer(layout, block, 0, kv, centers)
    q = rng.standard_normal((1, 2, 6, 80)).astype(np.float32)
    one = np.array([3])
    queries = Queries(q, np.arange(3)[None], one, 64 * one)
    found = attend_decode(Cache(layout, 0, blocks, centers), queries, Masking(2.0, 150, 5))
    for array in (found.output, found.max, found.log_sum):
        assert np.isfinite(array).all()
        digest.update(array.tobytes())
print(digest.hexdigest())
"""


def whole(path: str) -> str:
    environment = os.environ | {"KVMESH_SIMD": path}
    done = subprocess.run(
        [sys.executable, "-c", _WHOLE], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def fastest() -> str:
    return whole(simd.available()[0])


@pytest.mark.parametrize("path", [*simd.available()[1:], "emulated"])
def test_whole_attention_is_the_same_bits_on_every_instruction_set(path, fastest):
    assert whole(path) == fastest
