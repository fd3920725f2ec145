"""The rows of `bench codec`: an exact method loses nothing, and figures of known methods."""

import numpy as np
import pytest

from kvmesh.backends.models.loader import load_checkpoint
from kvmesh.integration import bench_codec, capture
from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.config import ModelConfig


def test_what_restores_exactly_loses_nothing_and_a_shift_is_seen():
    sample = bench_codec.synthetic(64, 256, 8)[0]
    same = bench_codec.Method("same", lambda dim: 64.0, lambda x, _: x, lambda x, _: x)
    row = bench_codec.measure(same, sample)
    lost = row.losses
    assert (lost.mse, lost.ip_bias, lost.ip_variance, lost.attention_error) == (0, 0, 0, 0)
    half = bench_codec.Method("half", lambda dim: 64.0, lambda x, _: x / 2, lambda x, _: x)
    row = bench_codec.measure(half, sample)
    lost = row.losses
    assert lost.mse == 0.25 and lost.softmax_kl > 0 and lost.attention_error > 0


def test_rows_of_both_synthetic_samples():
    rows = {(row.sample, row.method): row
            for row in bench_codec.bench_codec(bench_codec.synthetic(128, 1024, 32))}  # fmt: skip
    assert len(rows) == 2 * len(bench_codec.methods())
    gaussian = rows["gaussian", "turboquant mse 3"]
    assert gaussian.bits_per_element == 3.125
    assert gaussian.losses.mse == pytest.approx(0.03397, rel=0.02)
    for bits in (2, 3, 4):  # least squares: at no scale is the squared error less
        ours, fitted = rows["gaussian", f"kvmesh {bits}"], rows["gaussian", f"fitted scale {bits}"]
        assert fitted.bits_per_element == ours.bits_per_element
        assert fitted.losses.mse < ours.losses.mse
        assert fitted.losses.mse == pytest.approx(1 - 1 / (1 + ours.losses.mse), rel=0.02)
    for bits in (2, 3, 4):  # the mean takes the bits of whoever leaves it in
        ours, theirs = rows["offset", f"kvmesh {bits}"], rows["offset", f"turboquant mse {bits}"]
        assert ours.bits_per_element == theirs.bits_per_element
        assert ours.losses.softmax_kl < theirs.losses.softmax_kl / 2
        assert theirs.ours == ours.method and theirs.kl_to_ours > 2


def test_captured_heads_are_what_attention_saw():
    """Of a group of two query heads, against the model's own attention of the last token."""
    checkpoint = load_checkpoint(checkpoint_path(ModelConfig()))
    found = capture.capture(checkpoint, list(range(100, 292)))
    config = checkpoint.config
    assert found.k.shape == (config.num_layers, 192, config.num_kv_heads, config.head_dim)
    sample = bench_codec.captured(found, "some")
    assert len(sample.heads) == config.num_layers * config.num_kv_heads
    head = sample.heads[config.num_kv_heads + 1]  # layer 1, head 1
    np.testing.assert_array_equal(head.keys, found.k[1, :128, 1])
    np.testing.assert_array_equal(head.queries[-1], found.q[1, -1, 3])
    # Chunks and company do not matter, so neither does how much was captured at once.
    again = capture.capture(checkpoint, list(range(100, 230)))
    np.testing.assert_array_equal(again.k, found.k[:, :130])
    with pytest.raises(ValueError, match="captured 80 tokens, needs 96"):
        bench_codec.captured(capture.capture(checkpoint, list(range(80))), "short")
    with pytest.raises(ValueError, match="a sequence of 0 tokens"):
        capture.capture(checkpoint, [])


def test_measured_centers_are_the_mean_over_sequences():
    checkpoint = load_checkpoint(checkpoint_path(ModelConfig()))
    sequences = [list(range(10, 40)), list(range(300, 400))]
    found = capture.measure_centers(checkpoint, sequences)
    parts = [capture.capture(checkpoint, each) for each in sequences]
    for kind, name in enumerate("kv"):
        x = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_allclose(found.mean[:, kind], x.mean(axis=1), atol=1e-5)
        share = (x.mean(axis=1) ** 2).sum(axis=(1, 2)) / (x**2).mean(axis=1).sum(axis=(1, 2))
        np.testing.assert_allclose(found.share[:, kind], share, rtol=1e-4)
    assert found.tokens == 130
