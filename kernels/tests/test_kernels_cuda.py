"""The CUDA text on the CPU: the same bytes and the same attention as the NumPy reference."""

import zlib

import numpy as np
import pytest
from cuda_cases import Case, worst_error
from cuda_shim import ShimDevice, ShimError, build

from kvmesh.kernels import reference
from kvmesh.kernels.cuda.blocks import BlockTools
from kvmesh.kernels.cuda.plan import Splitting, plan_step
from kvmesh.kernels.cuda.source import Unit, attend_shape
from kvmesh.kernels.cuda.step import Rule
from kvmesh.kernels.cuda.stream import Streams
from kvmesh.kernels.errors import ChecksumMismatch, CodecError
from kvmesh.kernels.layout import BLOCK_SIZE, CODECS, KvLayout, supports_head_dim

BOUND = 2e-3  # relative error of attention against fp64 on the same codes
SHAPES = [
    ("k4v4", 128), ("k4v4", 80), ("k4v3", 256), ("k3v3", 64), ("k3v3", 192), ("k3v2", 96),
    ("k2v2", 112), ("k2v2", 128), ("k8v8", 64), ("k8v8", 80), ("fp16", 64), ("fp16", 144),
    ("fp32", 64),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "dim"), SHAPES)
def test_cuda_seals_as_the_reference_and_attends(codec, dim):
    """Prefill of a fresh prompt over a block's edge, beside a decode of three tokens."""
    case = Case(codec, dim)
    found = case.run()
    for sequence, (before, new) in enumerate(zip(case.before, case.new, strict=True)):
        for number in range((before + new) // BLOCK_SIZE):
            data = found.blocks[case.tables[sequence, number]]
            assert np.array_equal(data, case.sealed(sequence, number)), (sequence, number)
    expected, lse = case.expected(Rule())
    assert worst_error(found.out, expected) <= BOUND
    assert np.abs(found.lse - lse).max() <= BOUND
    assert np.array_equal(found.tails[0, 0, 0, :6], case.keys[0][64:70])
    assert np.array_equal(found.tails[1, 0, 1, :5], case.values[1][128:133])


@pytest.mark.parametrize("group", [1, 3, 7, 16])
def test_cuda_serves_any_group_and_query_length(group):
    """q_len 1 to 8 at positions around a block's edge; groups that fill a tile and that do not."""
    case = Case(
        "k4v4", 64, 1, group, before=(63, 64, 65, 120, 190), new=(1, 1, 8, 5, 2), seed=group
    )
    assert worst_error(case.run().out, case.expected(Rule())[0]) <= BOUND


@pytest.mark.parametrize(
    ("window", "cap", "sinks"),
    [(1, 0, False), (63, 0, False), (64, 5, True), (100, 0, True), (200, 1, False), (0, 3, True)],
)
def test_cuda_window_cap_and_sinks(window, cap, sinks):
    case = Case("k3v3", 64, before=(300, 10), new=(2, 150), seed=window)
    logits = np.linspace(-2, 4, 4).astype(np.float32) if sinks else None
    rule = Rule(cap=cap, window=window, sinks=logits)
    found = case.run(rule, Splitting(4, 1))
    expected, lse = case.expected(rule)
    assert worst_error(found.out, expected) <= BOUND
    assert np.abs(found.lse - lse).max() <= BOUND


def test_cuda_splits_change_nothing_but_rounding():
    case = Case("k4v4", 64, 1, 4, before=(64 * 9 + 5,), new=(1,))
    whole = case.run(splitting=Splitting(1)).out
    for most in (2, 3, 5, 8, 64):
        assert worst_error(case.run(splitting=Splitting(most, 1)).out, whole) <= 1e-5


@pytest.mark.parametrize(("codec", "dim"), [("k4v4", 64), ("k3v2", 192), ("fp32", 64)])
def test_cuda_row_has_the_same_bits_in_any_step(codec, dim):
    """Prefill in one cut, in two, and token by token; alone and in company."""
    whole = Case(codec, dim, 1, 3, before=(0,), new=(200,))
    expected = whole.run(splitting=Splitting(2, 1)).out
    for before, new in ((150, 50), (199, 1), (191, 9), (128, 3)):
        part = Case(codec, dim, 1, 3, before=(before, 70), new=(new, 2), seed=5)
        part.keys[0], part.values[0] = (
            whole.keys[0][: before + new],
            whole.values[0][: before + new],
        )
        part.centers = whole.centers
        part.q[:new] = whole.q[before : before + new]
        found = part.run(splitting=Splitting(2, 1)).out[:new]
        assert np.array_equal(found, expected[before : before + new]), (before, new)


def test_cuda_threads_in_reverse_give_the_same_bits():
    """A missing barrier shows when the last thread runs first."""
    case = Case("k3v3", 96)
    forward, backward = case.run(), case.run(device=ShimDevice(reversed_threads=True))
    assert np.array_equal(forward.out, backward.out)
    assert np.array_equal(forward.blocks, backward.blocks)


@pytest.mark.parametrize("codec", ["k4v4", "k3v2", "k8v8", "fp16"])
def test_cuda_seals_adversarial_vectors(codec):
    case = Case(codec, 64, before=(0,), new=(64,))
    for x in (case.keys[0], case.values[0]):
        x[0] = 0
        x[1] = case.centers[0, 0]
        x[2] = 7
        x[3] = 0
        x[3, :, 5] = 3e4
        x[4] = reference.rotation.base(64)[0, 0] * reference.rotation.signs(64)
        x[5] *= 1e4
        x[6] *= 1e-30
        x[7] *= 1e30
        x[8] = -case.centers[0, 1]
    found = case.run()
    assert np.array_equal(found.blocks[case.tables[0, 0]], case.sealed(0, 0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ["k4v4", "fp16"])
def test_cuda_refuses_what_is_not_finite(value, codec):
    case = Case(codec, 64, before=(0,), new=(64,))
    case.values[0][40, 1, 63] = value
    with pytest.raises(CodecError, match="segment 0"):
        case.run()


@pytest.mark.parametrize("layers", [1, 3])
def test_cuda_checksum_is_the_blocks_own(layers):
    layout = KvLayout(layers, 1, 48, "k3v3", bytes(range(16)))
    device = ShimDevice()
    tools = BlockTools(device, layout)
    rng = np.random.default_rng(layers)
    pool = rng.integers(0, 256, (5, layout.block_bytes), np.uint8)
    for row in pool[:4]:
        row[-4:] = np.frombuffer(zlib.crc32(row[:-4]).to_bytes(4, "little"), np.uint8)
    memory = device.put(pool)
    tools.verify(memory, [0, 3, 1, 2])
    with pytest.raises(ChecksumMismatch, match="block 4"):
        tools.verify(memory, [0, 4])
    memory[2, 77] ^= 1
    with pytest.raises(ChecksumMismatch, match="block 2"):
        tools.verify(memory, 2)


def test_cuda_moves_whole_blocks():
    layout = KvLayout(2, 1, 32, "k2v2", bytes(16))
    device = ShimDevice()
    tools = BlockTools(device, layout)
    rng = np.random.default_rng(1)
    pool = device.put(rng.integers(0, 256, (6, layout.block_bytes), np.uint8))
    staging = device.zeros((3, layout.block_bytes), np.uint8)
    tools.move(staging, [0, 1, 2], pool, [5, 0, 3])
    assert np.array_equal(staging, pool[[5, 0, 3]])
    tools.move(pool, [1, 2], staging, [2, 0])
    assert np.array_equal(pool[[1, 2]], staging[[2, 0]])
    with pytest.raises(ValueError, match="not in"):
        tools.move(pool, [6], staging, [0])


@pytest.mark.parametrize("size", [16, 16 * 255, 16 * 257, 1 << 20])
def test_cuda_streams_touch_every_byte(size):
    device = ShimDevice()
    streams = Streams(device)
    source = device.put(np.random.default_rng(size).integers(1, 256, size, np.uint8))
    target = device.zeros((size + 16,), np.uint8)
    streams.copy(target[:size], source)
    streams.read(source)
    assert np.array_equal(target[:size], source) and not target[size:].any()
    with pytest.raises(ValueError, match="over"):
        streams.copy(target, source)


def test_cuda_shared_memory_of_every_shape_fits():
    dims = [dim for dim in range(32, 257, 16) if supports_head_dim(dim)]
    assert dims[-1] == 256 and {64, 80, 96, 112, 128, 192} <= set(dims)
    for codec in CODECS.values():
        for dim in dims:
            shape = attend_shape(Unit("attend", dim, codec.key_bits, codec.value_bits))
            assert 2 * shape.decode_warps * shape.ring_bytes <= 96 << 10, (codec.name, dim)
            assert shape.prefill_bytes <= 48 << 10, (codec.name, dim)


def test_cuda_plan_takes_short_pieces_to_decode_and_long_ones_to_prefill():
    start, slots = np.array([62, 0], np.int64), np.zeros(2, np.int32)
    tables = np.zeros((2, 3), np.int32)
    plan = plan_step(np.array([0, 3, 103], np.int32), start, slots, tables, 4, Splitting(8))
    assert plan.decode.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert len(plan.prefill) == 16 + 12 and plan.prefill[16].tolist() == [1, 1, 0]
    assert plan.filled.tolist() == [[0, 0], [1, 0]]
    assert plan.token_part[:3].tolist() == [0, 8, 16]
    assert plan.token_part[3:].tolist() == [~part for part in range(24, 124)]
    assert plan.num_parts == 124


BROKEN = """
#include "device.cuh"
KERNEL half_waits(int* out) { if (threadIdx.x < 16) sync_block(); *out = 1; }
KERNEL half_shuffles(int* out) {
    if (threadIdx.x < 16) *out = shuffle_xor(1, 1); else sync_warp();
}
KERNEL all_wait(int* out) { sync_block(); if (threadIdx.x == 0) *out = 1; }
"""


@pytest.mark.parametrize("kernel", ["half_waits", "half_shuffles", "all_wait"])
def test_shim_stops_at_a_divergent_barrier(kernel):
    import ctypes

    names = ("half_waits", "half_shuffles", "all_wait")
    library = ctypes.CDLL(str(build("broken", BROKEN, names, "")))
    library.shim_message.restype = ctypes.c_char_p
    out = np.zeros(1, np.int32)
    args = (ctypes.c_void_p * 1)(ctypes.addressof(ctypes.c_void_p(out.ctypes.data)))
    failed = getattr(library, f"run_{kernel}")((ctypes.c_uint * 3)(1, 1, 1), 64, 0, args)
    assert failed == (kernel != "all_wait")
    assert (b"divergent" in library.shim_message()) == (kernel != "all_wait")


def test_shim_refuses_what_no_gpu_has():
    device = ShimDevice()
    with pytest.raises(ShimError, match="bytes"):
        device.launch(Unit("blocks"), "move_blocks", (1, 1, 1), 32, 1 << 20, ())
