"""The CPU kernels against the reference, and law 2 bit for bit."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from kvmesh.kernels import block, reference, rotation
from kvmesh.kernels.cpu import step
from kvmesh.kernels.errors import CodecError
from kvmesh.kernels.layout import CODECS, KvLayout

LENGTHS = (1, 63, 64, 65, 127, 128, 129, 300)


@dataclass
class Case:
    """One sequence on one layer of a small pool."""

    layout: KvLayout
    qkv: tuple[np.ndarray, np.ndarray, np.ndarray]
    centers: np.ndarray
    pool: np.ndarray
    tails: np.ndarray

    def run(self, start: int, count: int, slot: int = 0, table=range(6)) -> np.ndarray:
        return self.run_many([(slot, start, count, table)])

    def run_many(self, segments, threads: int = 1) -> np.ndarray:
        """segments: (slot, start, count, table), each over the same sequence's rows."""
        slots, starts, counts, blocks = zip(*segments, strict=True)
        plan = step.StepPlan(
            np.cumsum([0, *counts], dtype=np.int32),
            np.array(starts, np.int64),
            np.array(slots, np.int32),
            np.array([list(table) for table in blocks], np.int32),
        )
        rows = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
        q, k, v = (np.ascontiguousarray(x[rows]) for x in self.qkv)
        out = np.empty_like(q)
        step.run_layer(
            self.layout, self.pool, self.tails, plan, 0, (q, k, v), self.centers, out, threads
        )
        return out


def make(codec="k4v4", heads=2, group=2, dim=64, tokens=300, seed=0) -> Case:
    print("seed", seed)
    rng = np.random.default_rng(seed)
    layout = KvLayout(1, heads, dim, codec, bytes(16))
    centers = rng.standard_normal((1, 2, heads, dim)).astype(np.float32)
    q = 2 * rng.standard_normal((tokens, heads * group, dim)).astype(np.float32)
    k = rng.standard_normal((tokens, heads, dim)).astype(np.float32) + centers[0, 0]
    v = rng.standard_normal((tokens, heads, dim)).astype(np.float32) + centers[0, 1]
    pool = np.zeros((24, layout.block_bytes), np.uint8)
    # Stale garbage in tails must never be read.
    tails = np.full((4, 1, 2, 64, heads, dim), np.nan, np.float32)
    return Case(layout, (q, k, v), centers, pool, tails)


def expected_block(case: Case, number: int) -> np.ndarray:
    _, k, v = (x[64 * number : 64 * number + 64] for x in case.qkv)
    want = np.zeros(case.layout.block_bytes, np.uint8)
    reference.seal_layer(case.layout, want, 0, (k, v), case.centers[0])
    return want


def assert_right(case: Case, out: np.ndarray, tokens) -> None:
    """Every sealed block is the reference's bytes, every output the fp64 attention's.

    Queries and weights are rounded to 16 bits where keys and values are codes.
    """
    tolerance = 2e-4 if case.layout.spec.key_bits <= 8 else 2e-5
    q, k, v = case.qkv
    full = (max(tokens) + 1) // 64
    for number in range(full):
        np.testing.assert_array_equal(case.pool[number], expected_block(case, number))
    decoded = [
        reference.decode_layer(case.layout, case.pool[number], 0, case.centers[0])
        for number in range(full)
    ]
    for t in tokens:
        own = t // 64 * 64
        keys = np.concatenate([*(d[0] for d in decoded[: t // 64]), k[own : t + 1]])
        values = np.concatenate([*(d[1] for d in decoded[: t // 64]), v[own : t + 1]])
        want = reference.attend_reference(q[t], keys, values)
        assert np.abs(out[t] - want).max() <= tolerance * np.abs(want).max(), f"token {t}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("codec", list(CODECS))
def test_bytes_and_outputs_match_reference(codec, length):
    case = make(codec, tokens=length, seed=length)
    assert_right(case, case.run(0, length), range(length))


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("codec", list(CODECS))
def test_every_head_dim(codec, dim):
    case = make(codec, dim=dim, tokens=200, seed=dim)
    assert_right(case, case.run(0, 200), (0, 63, 64, 130, 199))


@pytest.mark.parametrize("group", range(1, 9))
def test_every_group_size(group):
    case = make(group=group, tokens=150, seed=group)
    assert_right(case, case.run(0, 150), (0, 64, 149))


@pytest.mark.parametrize("codec", list(CODECS))
def test_chunks_change_no_bit(codec):
    whole = make(codec, seed=7)
    want = whole.run(0, 300)
    for cuts in (range(1, 300), (64, 128), (1, 65, 66, 190, 192), (63, 127, 250)):
        case = make(codec, seed=7)
        edges = [0, *cuts, 300]
        parts = [case.run(a, b - a) for a, b in itertools.pairwise(edges)]
        np.testing.assert_array_equal(np.concatenate(parts), want)
        np.testing.assert_array_equal(case.pool, whole.pool)


def test_company_changes_no_bit():
    alone = make(seed=8)
    want = alone.run(0, 300)
    case = make(seed=8)
    case.run_many([(1, 0, 190, range(6, 12)), (2, 0, 64, range(12, 18))])
    out = case.run_many(
        [(2, 64, 1, range(12, 18)), (0, 0, 300, range(6)), (1, 190, 40, range(6, 12))]
    )
    np.testing.assert_array_equal(out[1:301], want)
    np.testing.assert_array_equal(out[0], want[64])
    np.testing.assert_array_equal(out[301:], want[190:230])
    np.testing.assert_array_equal(case.pool[:4], case.pool[[6, 7, 8, 3]])


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_no_bit(threads):
    whole, shared = make(heads=3, seed=8), make(heads=3, seed=8)
    want = whole.run(0, 300)
    np.testing.assert_array_equal(shared.run_many([(0, 0, 300, range(6))], threads), want)
    np.testing.assert_array_equal(shared.pool, whole.pool)
    tails = np.zeros((2, 1, 2, 64, 3, 64), np.float32)
    for number in range(2):
        for kind in (0, 1):
            tails[number, 0, kind] = whole.qkv[kind + 1][64 * number : 64 * number + 64]
    pool = np.zeros_like(whole.pool)
    step.seal_blocks(whole.layout, pool, np.array([5, 3]), tails, whole.centers, threads)
    step.finish_blocks(whole.layout, whole.pool, [0, 1])
    np.testing.assert_array_equal(pool[[5, 3]], whole.pool[:2])
    for row, number in ((5, 0), (3, 1)):
        block.verify(pool[row], whole.layout)
        at = whole.layout.header_bytes
        size = at + whole.layout.payload_bytes
        np.testing.assert_array_equal(pool[row, at:size], expected_block(whole, number)[at:size])
    tails[1, 0, 1, 5, 2, 7] = np.nan
    with pytest.raises(CodecError, match="tail 1, layer 0"):
        step.seal_blocks(whole.layout, pool, np.array([5, 3]), tails, whole.centers, threads)


def test_reused_prefix_changes_no_bit():
    want = make(seed=9).run(0, 300)
    case = make(seed=9)
    case.run(0, 128, slot=3, table=[20, 21, 0, 0, 0, 0])
    out = case.run(128, 172, slot=1, table=[20, 21, 7, 5, 9, 0])
    np.testing.assert_array_equal(out, want[128:])


def adversarial(dim: int) -> np.ndarray:
    """64 vectors that break careless codecs."""
    x = np.random.default_rng(10).standard_normal((64, dim)).astype(np.float32)
    rows = rotation.hadamard(np.eye(dim)) * rotation.signs(dim)
    x[0] = 0
    x[1] = 3
    x[2], x[3] = np.eye(dim)[5] * 1e4, np.eye(dim)[0] * -1e-4
    x[4], x[5] = rows[7], -100 * rows[0]
    x[6], x[7] = x[6] * 1e4, x[7] * 1e-6
    x[8], x[9] = 1e30, np.eye(dim)[1] * 6e4
    x[10], x[11] = 1e-30, -0.0
    x[12, :4] += 60
    return x


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_adversarial_vectors_seal_to_the_reference_bytes(codec, dim):
    case = make(codec, heads=1, group=1, dim=dim, tokens=64)
    x = adversarial(dim)[:, None]
    case = replace(case, qkv=(case.qkv[0], x, x.copy()), centers=np.zeros_like(case.centers))
    case.run(0, 64)
    np.testing.assert_array_equal(case.pool[0], expected_block(case, 0))
    keys, values = reference.decode_layer(case.layout, case.pool[0], 0, case.centers[0])
    assert np.isfinite(keys).all() and np.isfinite(values).all()
    assert not keys[0].any() and not values[0].any()
    for t in (1, 2, 4, 5, 6, 12):
        error = np.linalg.norm(values[t] - x[t]) / np.linalg.norm(x[t])
        bound = {2: 0.6, 3: 0.35}.get(case.layout.spec.value_bits, 0.2)
        assert error < (1.5 if t in (4, 5) else bound), f"vector {t}"


def test_random_bytes_match_over_many_magnitudes():
    for seed in range(20):
        case = make(heads=3, group=1, dim=64, tokens=64, seed=seed)
        size = np.float32(10.0) ** np.random.default_rng(seed).uniform(-9, 6, (64, 3, 1))
        q, k, v = case.qkv
        case = replace(case, qkv=(q, (k * size).astype(np.float32), (v * size).astype(np.float32)))
        case.run(0, 64)
        np.testing.assert_array_equal(case.pool[0], expected_block(case, 0), f"seed {seed}")


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_others_complete(codec, bad):
    case = make(codec, seed=11)
    want = case.run(0, 64)
    case.qkv[1][0, 1, 3] = bad
    plan = [(0, 64, 64, range(6)), (1, 0, 64, range(6, 12)), (2, 128, 1, range(6))]
    before = case.pool[6].copy()
    with pytest.raises(CodecError, match="segment 1, layer 0"):
        case.run_many(plan)
    np.testing.assert_array_equal(case.pool[6], before)
    np.testing.assert_array_equal(case.pool[1], expected_block(case, 1))
    assert want.shape == (64, 4, 64)


@pytest.mark.parametrize(
    "segment", [(9, 0, 4, range(6)), (-1, 0, 4, range(6)), (0, -1, 4, range(6)),
                (0, 0, 64, [99] * 6), (0, 128, 64, [0, 1]), (0, 64, 1, [-1, 0])]
)  # fmt: skip
def test_a_segment_outside_its_arrays_is_refused(segment):
    with pytest.raises(ValueError, match="segment 0 reaches outside"):
        make(seed=12).run_many([segment])


def test_arrays_that_do_not_fit_are_refused():
    case = make(seed=13)
    for change, name in (
        ({"pool": case.pool[:, :-64].copy()}, "pool"),
        ({"pool": case.pool[:, ::-1]}, "pool"),
        ({"tails": case.tails[:, :, :1].copy()}, "tails"),
        ({"tails": case.tails.astype(np.float64)}, "tails"),
        ({"centers": case.centers[:, :1]}, "centers"),
        ({"qkv": (case.qkv[0][:, :3], *case.qkv[1:])}, "q has shape"),
    ):
        with pytest.raises(ValueError, match=name):
            replace(case, **change).run(0, 4)


def test_finished_blocks_verify():
    case = make(seed=14)
    case.run(0, 300)
    step.finish_blocks(case.layout, case.pool, np.array([0, 3], np.int32))
    for number in (0, 3):
        assert block.verify(case.pool[number], case.layout).layout == case.layout


def test_compiled_once_for_every_codec_and_shape():
    step.warm()
    for codec in CODECS:
        make(codec, heads=1, group=8, dim=128, tokens=3).run(0, 3)
    assert len(step._run.signatures) == 1  # type: ignore[attr-defined]
