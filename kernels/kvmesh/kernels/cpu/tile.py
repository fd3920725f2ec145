"""What the kernels are told about a layer, and how they read a block's planes into fp32 tiles.

A tile holds one KV head of one block: keys [dim][64 tokens], values [64 tokens][dim], in the
rotated and centered space the block is coded in (in K's and V's own space for float codecs),
without their scales.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from kvmesh.kernels import codebook, rotation
from kvmesh.kernels.cpu.jit import from_half, kernel
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

_ONE = np.float32(1.0)
_CODE_BITS = 4  # the width that the quantized codecs of layout.CODECS use


class Geometry(NamedTuple):
    """One layer of a layout, as integers: offsets are bytes from the start of a block."""

    heads: int
    dim: int
    key_bits: int
    value_bits: int
    key_codes: int
    value_codes: int
    key_scales: int
    value_scales: int


class Tables(NamedTuple):
    """signs fp32 [dim], levels fp32 [16], thresholds fp32 [15], stored uint8 [16], pairs uint64
    [256]: the two fp32 levels of each byte."""

    signs: Any
    levels: Any
    thresholds: Any
    stored: Any
    pairs: Any


class Pool(NamedTuple):
    """The same memory [num_blocks, ...] as uint8, as fp16 bits (uint16) and as fp32."""

    octets: Any
    halves: Any
    floats: Any


class Scratch(NamedTuple):
    """Work space of one call: a tile, its scales, and the state of each query row."""

    keys: Any  # fp32 [dim, 64]
    values: Any  # fp32 [64, dim]
    key_scales: Any  # fp32 [64]
    value_scales: Any  # fp32 [64]
    weights: Any  # fp32 [64]
    halves: Any  # fp32 [32], for a sum by halves
    queries: Any  # fp32 [rows, dim]
    bias: Any  # fp32 [rows], the query's product with the keys' center
    peak: Any  # fp32 [rows], largest score so far
    total: Any  # fp32 [rows], sum of exp(score - peak)
    mixed: Any  # fp32 [rows, dim], the values' sum under those weights


@functools.cache
def geometry(layout: KvLayout, layer: int) -> Geometry:
    return Geometry(
        layout.num_kv_heads,
        layout.head_dim,
        layout.spec.key_bits,
        layout.spec.value_bits,
        layout.key_codes_at(layer),
        layout.value_codes_at(layer),
        layout.key_scales_at(layer),
        layout.value_scales_at(layer),
    )


@functools.cache
def tables(head_dim: int) -> Tables:
    # Copies: the sources are read-only, which Numba would compile as another type.
    return Tables(
        rotation.signs(head_dim).copy(),
        codebook.levels(_CODE_BITS).copy(),
        codebook.thresholds(_CODE_BITS).copy(),
        codebook.stored_codes(_CODE_BITS).copy(),
        codebook.level_pairs(_CODE_BITS).view(np.uint64).reshape(256).copy(),
    )


@kernel
def make_scratch(dim: int, rows: int) -> Any:
    """Tiles start as zeros: lanes past a tail's end are computed on, then ignored."""
    return Scratch(
        np.zeros((dim, BLOCK_SIZE), np.float32),
        np.zeros((BLOCK_SIZE, dim), np.float32),
        np.empty(BLOCK_SIZE, np.float32),
        np.empty(BLOCK_SIZE, np.float32),
        np.empty(BLOCK_SIZE, np.float32),
        np.empty(BLOCK_SIZE // 2, np.float32),
        np.empty((rows, dim), np.float32),
        np.empty(rows, np.float32),
        np.empty(rows, np.float32),
        np.empty(rows, np.float32),
        np.empty((rows, dim), np.float32),
    )


@kernel
def hadamard(x: Any) -> None:
    """Unnormalised Walsh-Hadamard transform of fp32 [dim], in place."""
    span = 1
    while span < x.size:
        for start in range(0, x.size, 2 * span):
            for i in range(start, start + span):
                low = x[i]
                high = x[i + span]
                x[i] = low + high
                x[i + span] = low - high
        span *= 2


@kernel
def _read_plane(pool: Any, block: int, offset: int, bits: int, pairs: Any, out: Any) -> None:
    """Decodes out.size elements that start `offset` bytes into a block. out: fp32, contiguous."""
    if bits == 4:
        two = out.view(np.uint64)
        for i in range(two.size):
            two[i] = pairs[pool.octets[block, offset + i]]
    elif bits == 16:
        for i in range(out.size):
            out[i] = from_half(pool.halves[block, offset // 2 + i])
    else:
        for i in range(out.size):
            out[i] = pool.floats[block, offset // 4 + i]


@kernel
def _read_scales(pool: Any, block: int, offset: int, bits: int, out: Any) -> None:
    for t in range(BLOCK_SIZE):
        out[t] = from_half(pool.halves[block, offset // 2 + t]) if bits <= 8 else _ONE


@kernel
def read_tile(geo: Any, table: Any, pool: Any, block: int, head: int, scratch: Any) -> None:
    """Fills the scratch tile and its scales with one KV head of a sealed block."""
    size = BLOCK_SIZE * geo.dim
    keys = geo.key_codes + head * size * geo.key_bits // 8
    values = geo.value_codes + head * size * geo.value_bits // 8
    _read_plane(pool, block, keys, geo.key_bits, table.pairs, scratch.keys.reshape(size))
    _read_plane(pool, block, values, geo.value_bits, table.pairs, scratch.values.reshape(size))
    scales = head * BLOCK_SIZE * 2
    _read_scales(pool, block, geo.key_scales + scales, geo.key_bits, scratch.key_scales)
    _read_scales(pool, block, geo.value_scales + scales, geo.value_bits, scratch.value_scales)
