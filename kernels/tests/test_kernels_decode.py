"""Decode attention against fp64 attention on the same codes, and exact merging of its parts."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from kvmesh.kernels import reference
from kvmesh.kernels.cpu import decode
from kvmesh.kernels.cpu.decode import attend_decode
from kvmesh.kernels.cpu.decode_inputs import Cache, Masking, Queries
from kvmesh.kernels.layout import CODECS, KvLayout
from kvmesh.kernels.merge import Partial, merge


@dataclass
class Case:
    """One sequence: its cache, its queries, and what they attend to in fp64."""

    cache: Cache
    queries: Queries
    keys: np.ndarray  # fp64 [tokens, Hkv, D]
    values: np.ndarray


def make(codec="k4v4", dim=64, heads=2, group=2, n=1, tokens=200, seed=0) -> Case:
    """`tokens` in whole blocks and a tail that holds at least the n queries."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    layout = KvLayout(1, heads, dim, codec, bytes(16))
    centers = rng.standard_normal((2, heads, dim)).astype(np.float32)
    k, v = (rng.standard_normal((tokens, heads, dim)).astype(np.float32) + c for c in centers)
    count = (tokens - n) // 64
    order = rng.permutation(count + 2)[:count]
    blocks = np.zeros((count + 2, layout.block_bytes), np.uint8)
    parts = []
    for number, row in enumerate(order):
        own = slice(64 * number, 64 * number + 64)
        reference.seal_layer(layout, blocks[row], 0, (k[own], v[own]), centers)
        parts.append(reference.decode_layer(layout, blocks[row], 0, centers))
    tail = np.full((1, 2, 64, heads, dim), np.nan, np.float32)
    left = tokens - 64 * count
    assert left <= 64, "choose tokens so that the queries lie in one block"
    tail[0, 0, :left], tail[0, 1, :left] = k[64 * count :], v[64 * count :]
    queries = Queries(
        2 * rng.standard_normal((1, n, heads * group, dim)).astype(np.float32),
        order[None].astype(np.int32), np.array([count]), np.array([tokens - n]),
        tail, np.array([left]),
    )  # fmt: skip
    keys, values = (
        np.concatenate([*(p[i] for p in parts), x[64 * count :]]) for i, x in enumerate((k, v))
    )
    return Case(Cache(layout, 0, blocks, centers), queries, keys, values)


def expected(case: Case, masking: Masking) -> tuple[np.ndarray, np.ndarray]:
    """fp64 output [n, Hq, D] and log of the sum of exp(score) [n, Hq], written plainly."""
    q = case.queries.q[0].astype(np.float64)
    n, query_heads, dim = q.shape
    tokens = len(case.keys)
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:2])
    for i in range(n):
        position = tokens - n + i
        at = np.arange(tokens)
        seen = at <= position
        if masking.window:
            seen &= (at > position - masking.window) | (at < masking.kept)
        for h in range(query_heads):
            own = h // (query_heads // case.keys.shape[1])
            scores = case.keys[seen, own] @ q[i, h] / np.sqrt(dim)
            if masking.soft_cap:
                scores = masking.soft_cap * np.tanh(scores / masking.soft_cap)
            weights = np.exp(scores)
            total = weights.sum() + (
                0 if masking.sinks is None else np.exp(np.float64(masking.sinks[h]))
            )
            out[i, h] = weights @ case.values[seen, own] / total
            lse[i, h] = np.log(total)
    return out, lse


def assert_right(case: Case, masking: Masking | None = None, bound: float = 2e-4) -> Partial:
    masking = masking or Masking()
    found = attend_decode(case.cache, case.queries, masking)
    out, lse = expected(case, masking)
    error = np.linalg.norm(found.output[0] - out) / np.linalg.norm(out)
    assert error <= bound
    np.testing.assert_allclose(found.max[0] + found.log_sum[0], lse, atol=1e-3)
    return found


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_every_codec_and_head_dim(codec, dim):
    assert_right(make(codec, dim, tokens=150, seed=dim))


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_with_up_to_eight_queries(group):
    n = group % 8 + 1
    assert_right(make(group=group, n=n, heads=1, tokens=128 + n, seed=group))


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 128, 64 * 64, 64 * 64 + 1, 64 * 130 + 7])
def test_lengths_across_block_and_split_edges(tokens):
    assert_right(make("k3v3", heads=1, group=1, tokens=tokens, seed=tokens))


@pytest.mark.parametrize("codec", ["k4v4", "fp16"])
@pytest.mark.parametrize(
    "masking",
    [
        Masking(soft_cap=2.0),
        Masking(window=100),
        Masking(window=1),
        Masking(window=70, kept=5),
        Masking(window=64, kept=64),
        Masking(window=5000),
        Masking(sinks=np.array([0.5, -3, 4, 30], np.float32)),
        Masking(1.5, 90, 3, np.zeros(4, np.float32)),
    ],
    ids=str,
)
def test_masking(codec, masking):
    assert_right(make(codec, n=4, tokens=300, seed=7), masking)


def test_threads_company_and_splits_change_no_bit(monkeypatch):
    cases = [make(tokens=64 * blocks + 3, heads=2, n=3, seed=blocks) for blocks in (0, 1, 130, 67)]
    width = max(case.queries.tables.shape[1] for case in cases)
    rows = np.cumsum([0, *(len(case.cache.blocks) for case in cases)])
    cache = replace(cases[0].cache, blocks=np.concatenate([c.cache.blocks for c in cases]))
    cases = [replace(c, cache=replace(c.cache, centers=cache.centers)) for c in cases]
    tables = np.stack(
        [np.pad(c.queries.tables[0] + row, (0, width - c.queries.tables.shape[1]))
         for c, row in zip(cases, rows, strict=False)]
    )  # fmt: skip
    many = Queries(
        tables=tables,
        **{name: np.concatenate([getattr(c.queries, name) for c in cases])
           for name in ("q", "counts", "positions", "tails", "tail_counts")},
    )  # fmt: skip
    together = attend_decode(cache, many, threads=1)
    for threads in (2, 3, 7):
        again = attend_decode(cache, many, threads=threads)
        for name in ("output", "max", "log_sum"):
            np.testing.assert_array_equal(getattr(again, name), getattr(together, name))
    for i, case in enumerate(cases):
        alone = attend_decode(case.cache, case.queries)
        np.testing.assert_array_equal(alone.output[0], together.output[i])
    for size in (1, 5, 1000):
        monkeypatch.setattr(decode, "SPLIT_BLOCKS", size)
        other = attend_decode(cache, many, threads=2)
        np.testing.assert_allclose(other.output, together.output, atol=1e-5)


def test_parts_of_shards_merge_to_the_whole():
    """Odd blocks on one shard, even ones on another, the tail with the worker; under a window."""
    case = make("k3v3", n=2, tokens=64 * 9 + 20, seed=3)
    masking = Masking(soft_cap=3.0, window=400, kept=10)
    sinks = np.array([1, 0, -1, 2], np.float32)
    whole = attend_decode(case.cache, case.queries, replace(masking, sinks=sinks))
    queries, parts = case.queries, []
    for first in (0, 1):
        own = np.arange(first, 9, 2)
        shard = replace(
            queries, tables=queries.tables[:, own], counts=np.array([len(own)]),
            starts=64 * own[None], tails=None, tail_counts=None,
        )  # fmt: skip
        parts.append(attend_decode(case.cache, shard, masking))
    worker = replace(queries, tables=queries.tables[:, :0], counts=np.array([0]))
    parts.append(attend_decode(case.cache, worker, replace(masking, sinks=sinks)))
    merged = merge(parts)
    np.testing.assert_allclose(merged.output, whole.output, atol=1e-5)
    np.testing.assert_allclose(
        merged.max + merged.log_sum, whole.max + whole.log_sum, atol=1e-5
    )  # fmt: skip


def test_a_query_that_sees_nothing_weighs_nothing():
    case = make(tokens=200, seed=4)
    nothing = replace(case.queries, counts=np.array([0]), tails=None, tail_counts=None)
    empty = attend_decode(case.cache, nothing)
    assert not empty.output.any() and np.isneginf(empty.max).all() and not empty.log_sum.any()
    whole = attend_decode(case.cache, case.queries)
    merged = merge([empty, whole, empty])
    np.testing.assert_allclose(merged.output, whole.output, rtol=1e-6)
    assert np.isneginf(merge([empty, empty]).max).all()
    hidden = attend_decode(
        case.cache, replace(nothing, counts=np.array([1])), Masking(window=10)
    )  # fmt: skip
    assert not hidden.output.any() and np.isneginf(hidden.max).all()


def test_merge_refuses_what_does_not_fit():
    one = attend_decode(make(seed=5).cache, make(seed=5).queries)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])
    with pytest.raises(ValueError, match="must all be the same"):
        merge([one, replace(one, output=one.output[:, :, :1])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((1, 9, 4, 64), np.float32)}, r"must be \[S, 1\.\.8"),
        ({"q": np.zeros((1, 1, 3, 64), np.float32)}, "q has 3 heads"),
        ({"q": np.zeros((1, 1, 34, 64), np.float32)}, r"1\.\.16 times 2"),
        ({"tables": np.array([[0, 1, 99]])}, r"tables name block 99, must be in \[0, 5\)"),
        ({"tables": np.array([[0, -1, 1]])}, "tables name block -1"),
        ({"counts": np.array([4])}, "tables hold 3"),
        ({"tail_counts": np.array([65])}, r"a tail has 65 tokens, must be 0 or 1\.\.64"),
        ({"positions": np.array([1, 2])}, "positions has shape"),
        ({"starts": np.zeros((1, 2))}, "starts has shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = make(seed=6)
    with pytest.raises(ValueError, match=message):
        attend_decode(case.cache, replace(case.queries, **change))


def test_other_arrays_are_refused():
    case = make(seed=6)
    with pytest.raises(ValueError, match="centers has shape"):
        attend_decode(replace(case.cache, centers=case.cache.centers[:1]), case.queries)
    with pytest.raises(ValueError, match="sinks has shape"):
        attend_decode(case.cache, case.queries, Masking(sinks=np.zeros(3, np.float32)))
    with pytest.raises(ValueError, match="negative"):
        attend_decode(case.cache, case.queries, Masking(window=-1))
