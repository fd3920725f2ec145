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
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout, plane_bytes

_ONE = np.float32(1.0)

head_bytes = kernel(plane_bytes)


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
    """Constants of one layer; what differs between keys (0) and values (1) is stacked.

    signs fp32 [dim] and base fp32 [m, m] (rotation.py); thresholds fp32 [2, 15], stored uint8
    [2, 16] and levels fp32 [2, 256] (codebook.py), each filled as far as its width goes.
    """

    signs: Any
    base: Any
    thresholds: Any
    stored: Any
    levels: Any


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
    at = layout.planes(layer)
    return Geometry(
        layout.num_kv_heads,
        layout.head_dim,
        at.codec.key_bits,
        at.codec.value_bits,
        at.key_codes,
        at.value_codes,
        at.key_scales,
        at.value_scales,
    )


@functools.cache
def tables(layout: KvLayout, layer: int) -> Tables:
    # Copies: the sources are read-only, which Numba would compile as another type.
    table = Tables(
        rotation.signs(layout.head_dim).copy(),
        rotation.base(layout.head_dim).copy(),
        np.zeros((2, 15), np.float32),
        np.zeros((2, 16), np.uint8),
        np.zeros((2, 256), np.float32),
    )
    codec = layout.planes(layer).codec
    for kind, bits in enumerate((codec.key_bits, codec.value_bits)):
        if bits <= 8:
            table.levels[kind, : 1 << bits] = codebook.levels(bits)
        if bits < 8:
            table.thresholds[kind, : (1 << bits) - 1] = codebook.thresholds(bits)
            table.stored[kind, : 1 << bits] = codebook.stored_codes(bits)
    return table


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
def hadamard(x: Any, base: Any) -> None:
    """Unnormalised Hadamard transform of fp32 [dim], in place; base: rotation.base(dim)."""
    count = base.shape[0]
    columns = x.size // count
    span = 1
    while span < columns:
        for start in range(0, x.size, 2 * span):
            for i in range(start, start + span):
                low = x[i]
                high = x[i + span]
                x[i] = low + high
                x[i + span] = low - high
        span *= 2
    if count > 1:
        before = np.empty(x.size, np.float32)
        for i in range(x.size):
            before[i] = x[i]
        for i in range(x.size):
            total = base[i // columns, 0] * before[i % columns]
            for j in range(1, count):
                total = total + base[i // columns, j] * before[j * columns + i % columns]
            x[i] = total


@kernel
def _read_words(octets: Any, levels: Any, width: int, out: Any) -> None:
    """Decodes words of 2, 4 or 8 bits (block.py) along the first axis of out fp32 [length, lanes].

    levels: fp32 [256].
    """
    length, lanes = out.shape
    mask = np.uint8((1 << width) - 1)
    for j in range(length):
        word, rest = divmod(j, 32 // width)
        shift = np.uint8(rest // 4 * width)
        first = 4 * lanes * word + rest % 4
        for lane in range(lanes):
            out[j, lane] = levels[octets[first + 4 * lane] >> shift & mask]


@kernel
def _flip_signs(octets: Any, out: Any) -> None:
    """Negates out fp32 [length, lanes] where the plane of signs has a one."""
    length, lanes = out.shape
    for j in range(length):
        word, rest = divmod(j, 32)
        shift = np.uint8(rest // 4)
        first = 4 * lanes * word + rest % 4
        for lane in range(lanes):
            if octets[first + 4 * lane] >> shift & np.uint8(1):
                out[j, lane] = -out[j, lane]


@kernel
def _read_plane(pool: Any, block: int, offset: int, bits: int, levels: Any, out: Any) -> None:
    """Decodes one head's plane, `offset` bytes into a block, to out fp32 [length, lanes]."""
    octets = pool.octets[block, offset:]
    if bits == 3:  # a magnitude's code is that of its positive level
        _read_words(octets, levels, 2, out)
        _flip_signs(octets[out.size // 4 :], out)
    elif bits <= 8:
        _read_words(octets, levels, bits, out)
    else:
        flat = out.reshape(out.size)
        for i in range(out.size):
            if bits == 16:
                flat[i] = from_half(pool.halves[block, offset // 2 + i])
            else:
                flat[i] = pool.floats[block, offset // 4 + i]


@kernel
def _read_scales(pool: Any, block: int, offset: int, bits: int, out: Any) -> None:
    for t in range(BLOCK_SIZE):
        out[t] = from_half(pool.halves[block, offset // 2 + t]) if bits <= 8 else _ONE


@kernel
def read_tile(geo: Any, table: Any, pool: Any, block: int, head: int, scratch: Any) -> None:
    """Fills the scratch tile and its scales with one KV head of a sealed block."""
    for kind in range(2):
        bits = geo.value_bits if kind else geo.key_bits
        tile = scratch.values if kind else scratch.keys
        plane = geo.value_codes if kind else geo.key_codes
        plane += head * head_bytes(tile.shape[0], tile.shape[1], bits)
        _read_plane(pool, block, plane, bits, table.levels[kind], tile)
        at = (geo.value_scales if kind else geo.key_scales) + head * BLOCK_SIZE * 2
        _read_scales(pool, block, at, bits, scratch.value_scales if kind else scratch.key_scales)
