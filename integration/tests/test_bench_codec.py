"""The rows of `bench codec`: an exact method loses nothing, and figures of known methods."""

import numpy as np
import pytest

from kvmesh.integration import bench_codec
from kvmesh.kernels import block, reference
from kvmesh.kernels.layout import KvLayout


def test_what_restores_exactly_loses_nothing_and_a_shift_is_seen():
    sample = bench_codec.synthetic(64, 256, 8)[0]
    same = bench_codec.Method("same", lambda dim: 64.0, np.copy, np.copy)
    row = bench_codec.measure(same, sample)
    assert (row.mse, row.ip_bias, row.ip_variance, row.attention_error) == (0, 0, 0, 0)
    half = bench_codec.Method("half", lambda dim: 64.0, lambda x: x / 2, np.copy)
    row = bench_codec.measure(half, sample)
    assert row.mse == 0.25 and row.softmax_kl > 0 and row.attention_error > 0


def test_rows_of_both_synthetic_samples():
    rows = {(row.sample, row.method): row
            for row in bench_codec.bench_codec(bench_codec.synthetic(128, 1024, 32))}  # fmt: skip
    assert len(rows) == 2 * len(bench_codec.methods())
    gaussian = rows["gaussian", "turboquant mse 3"]
    assert gaussian.bits_per_element == 3.125
    assert gaussian.mse == pytest.approx(0.03397, rel=0.02)
    for bits in (2, 3, 4):  # the mean takes the bits of whoever leaves it in
        ours, theirs = rows["offset", f"kvmesh {bits}"], rows["offset", f"turboquant mse {bits}"]
        assert ours.bits_per_element == theirs.bits_per_element
        assert ours.softmax_kl < theirs.softmax_kl / 2


def test_captured_blocks_give_what_was_sealed():
    layout = KvLayout(2, 2, 64, "fp32", bytes(16))
    kv = tuple(np.random.default_rng(0).standard_normal((2, 64, 2, 64)).astype(np.float32))
    sealed = np.zeros((1, layout.block_bytes), np.uint8)
    centers = np.zeros((2, 2, 64), np.float32)
    reference.seal_layer(layout, sealed[0], 1, kv, centers)
    block.finish(layout, sealed[0])
    sample = bench_codec.captured(layout, sealed, 1, 1, np.ones((1, 64)))
    np.testing.assert_array_equal(sample.keys, kv[0][:, 1])
    np.testing.assert_array_equal(sample.values, kv[1][:, 1])
    with pytest.raises(ValueError, match="must be fp32"):
        bench_codec.captured(KvLayout(1, 1, 64, "k4v4", bytes(16)), sealed, 0, 0, sample.queries)
