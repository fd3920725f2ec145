"""Every width and head_dim: properties against the reference, and the acceptance figures."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.kernels import block, codebook, errors, reference, rotation
from kvmesh.kernels.cpu import step
from kvmesh.kernels.layout import CODECS, KvLayout, plane_bytes, supports_head_dim

DIMS = [dim for dim in range(64, 257) if supports_head_dim(dim)]
NO_CENTER = np.zeros(128, np.float32)
MIXED = KvLayout(3, 2, 80, "k3v3", bytes(16), ("k8v8", "k3v3", "fp16"))


def run(layout, layer, qkv, cuts, centers):
    """One sequence through one layer, cut where told. Returns its blocks and outputs."""
    q, k, v = qkv
    blocks = len(q) // 64 + 1
    pool = np.zeros((blocks, layout.block_bytes), np.uint8)
    heads, dim = layout.num_kv_heads, layout.head_dim
    tails = np.full((1, layout.num_layers, 2, 64, heads, dim), np.nan, np.float32)
    parts = []
    for a, b in itertools.pairwise([0, *cuts, len(q)]):
        plan = step.StepPlan(
            np.array([0, b - a], np.int32), np.array([a], np.int64), np.zeros(1, np.int32),
            np.arange(blocks, dtype=np.int32)[None],
        )  # fmt: skip
        out = np.empty_like(q[a:b])
        own = (q[a:b].copy(), k[a:b].copy(), v[a:b].copy())
        step.run_layer(layout, pool, tails, plan, layer, own, centers, out)
        parts.append(out)
    return pool, np.concatenate(parts)


def draw(layout, group, tokens, seed):
    rng = np.random.default_rng(seed)
    heads, dim = layout.num_kv_heads, layout.head_dim
    q, k, v = (
        rng.standard_normal((tokens, count, dim)).astype(np.float32)
        for count in (heads * group, heads, heads)
    )
    centers = rng.standard_normal((layout.num_layers, 2, heads, dim)).astype(np.float32)
    return (q, k + centers[0, 0], v + centers[0, 1]), centers


def spoil(x, kind, at):
    """One vector that breaks careless codecs."""
    dim = x.shape[-1]
    x[at] = {
        "constant": np.full(dim, 3), "one-hot": np.eye(dim)[at % dim], "zero": np.zeros(dim),
        "row": rotation.hadamard(np.eye(dim))[at % dim] * rotation.signs(dim),
        "large": x[at] * 1e4, "plain": x[at],
    }[kind]  # fmt: skip


@settings(deadline=None, max_examples=60, print_blob=True)
@given(
    codec=st.sampled_from(list(CODECS)),
    dim=st.sampled_from(DIMS),
    group=st.integers(1, 16),
    tokens=st.sampled_from([1, 63, 64, 65, 127, 128, 129, 140]),
    kind=st.sampled_from(["constant", "one-hot", "zero", "row", "large", "plain"]),
    seed=st.integers(0, 999),
)
def test_any_shape_matches_the_reference(codec, dim, group, tokens, kind, seed):
    layout = KvLayout(1, 1, dim, codec, bytes(16))
    qkv, centers = draw(layout, group, tokens, seed)
    for x in qkv[1:]:
        spoil(x, kind, seed % tokens)
    pool, out = run(layout, 0, qkv, [], centers)
    q, k, v = qkv
    for number in range(tokens // 64):
        own = slice(64 * number, 64 * number + 64)
        want = np.zeros(layout.block_bytes, np.uint8)
        reference.seal_layer(layout, want, 0, (k[own], v[own]), centers[0])
        np.testing.assert_array_equal(pool[number], want)
    last = tokens - 1
    decoded = [reference.decode_layer(layout, pool[n], 0, centers[0]) for n in range(last // 64)]
    tail = slice(last // 64 * 64, tokens)
    keys = np.concatenate([*(d[0] for d in decoded), k[tail]])
    values = np.concatenate([*(d[1] for d in decoded), v[tail]])
    expected = reference.attend_reference(q[last], keys, values)
    # Keys of 1e4 make scores of 1e4, whose fp32 rounding alone moves a weight by 1e-3.
    bound = 5e-2 if kind == "large" else 2e-4
    assert np.abs(out[last] - expected).max() <= bound * np.abs(values).max()


@pytest.mark.parametrize("codec", list(CODECS))
def test_token_by_token_is_bulk(codec):
    layout = KvLayout(1, 2, 96, codec, bytes(16))
    qkv, centers = draw(layout, 3, 130, 5)
    want = run(layout, 0, qkv, [], centers)
    for cuts in (range(1, 130), (1, 64, 65, 127)):
        for found, expected in zip(run(layout, 0, qkv, cuts, centers), want, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_each_layer_keeps_its_own_codec():
    qkv, centers = draw(MIXED, 2, 64, 6)
    centers[1:] = centers[0]
    sealed = np.zeros(MIXED.block_bytes, np.uint8)
    for layer in range(3):
        at = MIXED.planes(layer)
        pool, _ = run(MIXED, layer, qkv, [], centers)
        sealed[at.key_codes : at.end] = pool[0, at.key_codes : at.end]
        alone = KvLayout(1, 2, 80, at.codec.name, bytes(16))
        want = np.zeros(alone.block_bytes, np.uint8)
        reference.seal_layer(alone, want, 0, qkv[1:], centers[0])
        np.testing.assert_array_equal(pool[0, at.key_codes : at.end], want[64:-64])
    block.finish(MIXED, sealed)
    assert block.verify(sealed, MIXED).layout == MIXED
    assert MIXED.codec_label == "k3v3+0:k8v8+2:fp16"
    with pytest.raises(errors.WrongLayout, match=r"codec is k3v3\+0:k8v8\+2:fp16, expected k3v3"):
        block.verify(sealed, replace(MIXED, layer_codecs=()))
    for at, value in ((64, 99), (66, 3), (56, 0), (57, 9)):
        damaged = sealed.copy()
        damaged[at] = value
        with pytest.raises(errors.BlockError):
            block.verify(damaged)


def test_layer_codecs_have_one_form():
    assert replace(MIXED, layer_codecs=("k3v3",) * 3) == replace(MIXED, layer_codecs=())
    with pytest.raises(ValueError, match="layer_codecs has 2 codecs, must have 3"):
        replace(MIXED, layer_codecs=("k3v3", "k2v2"))
    with pytest.raises(ValueError, match="codec is 'k9v9'"):
        replace(MIXED, layer_codecs=("k3v3", "k9v9", "fp16"))


@pytest.mark.parametrize("dim", [*DIMS, 576])
def test_rotation_is_a_symmetric_hadamard_matrix(dim):
    matrix = rotation.hadamard(np.eye(dim))
    np.testing.assert_array_equal(np.abs(matrix), np.ones((dim, dim)))
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(matrix @ matrix, dim * np.eye(dim))


@pytest.mark.parametrize("length", [32, 48, 80, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_and_unpack_are_inverse(bits, length):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, length, 64)).astype(np.uint8)
    plane = reference.pack(codes, bits)
    assert plane.shape == (3, plane_bytes(length, 64, bits))
    np.testing.assert_array_equal(reference.unpack(plane, bits, codes.shape), codes)


def test_words_lie_as_the_diagram_says():
    """Element 4 k + b of a word is field k of byte b; the signs of 3 bits are a plane behind."""
    codes = np.random.default_rng(3).integers(0, 8, (1, 48, 2)).astype(np.uint8)
    plane = reference.pack(codes, 3)[0]
    for element, lane in itertools.product(range(48), range(2)):
        word, rest = divmod(element, 16)
        low = plane[(word * 2 + lane) * 4 + rest % 4] >> (rest // 4 * 2) & 3
        word, rest = divmod(element, 32)
        sign = plane[24 + (word * 2 + lane) * 4 + rest % 4] >> (rest // 4) & 1
        assert low | sign << 2 == codes[0, element, lane]
    assert not (plane[32:] >> 4).any()  # elements 48..63 are padding


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.36089), (2, 0.11600), (3, 0.03397),
                                                  (4, 0.00932), (8, 8.5e-5)])  # fmt: skip
def test_acceptance_distortion_and_bias(bits, distortion):
    rng = np.random.default_rng(bits)
    u = rng.standard_normal((16_000, 128))
    u = (u / np.linalg.norm(u, axis=1, keepdims=True)).astype(np.float32)
    codes, scales = reference.encode(u, NO_CENTER, "key", bits)
    plain = np.full(len(u), 1 / np.sqrt(128))
    coded = codebook.levels(bits)[codes] * plain[:, None]
    back = rotation.hadamard(coded) * rotation.signs(128) / np.sqrt(128)
    found = ((back - u) ** 2).sum(axis=1).mean()
    assert found == pytest.approx(distortion, rel=0.01 if bits < 8 else 0.1)
    other = rng.standard_normal(u.shape)
    other -= (other * u).sum(axis=1, keepdims=True) * u
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    error = reference.decode(codes, scales, NO_CENTER, bits) - u
    for rho in (0.0, 0.3, 0.8):
        y = rho * u + np.sqrt(1 - rho**2) * other
        bias = (y * error).sum(axis=1)
        assert abs(bias.mean()) < max(1e-3, 4 * bias.std() / np.sqrt(len(u)))
