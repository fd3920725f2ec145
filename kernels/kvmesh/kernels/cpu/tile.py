"""What the kernels are told about a layer, and how they find and read a block's planes.

A tile holds one KV head of one block of floats, or of a tail: keys [dim][64 tokens], values
[64 tokens][dim], in K's and V's own space. Codes are never read into tiles: dot.py takes them.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from kvmesh.kernels import codebook, rotation
from kvmesh.kernels.cpu.dot import Weights
from kvmesh.kernels.cpu.jit import from_half, kernel
from kvmesh.kernels.cpu.simd import ROWS
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout, plane_bytes

_LINE = 64  # bytes
_NEVER = np.float32(-np.inf)

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
    block_bytes: int


class Tables(NamedTuple):
    """Constants of one layer; what differs between keys (0) and values (1) is stacked."""

    signs: Any  # fp32 [dim], of rotation.py
    base: Any  # fp32 [m, m], of rotation.py
    half_step: Any  # fp32 [2], of codebook.step


class Pool(NamedTuple):
    """The same memory [num_blocks, ...] as uint8, as fp16 bits (uint16) and as fp32."""

    octets: Any
    halves: Any
    floats: Any


class Places(NamedTuple):
    """Addresses of the work space of one call, its rows those of the queries.

    Loops over blocks pass these and no arrays: each array that is passed is counted, by an atomic
    operation, and together they would cost more than the dot products.
    """

    weights: Any  # fp32 [ROWS, 64]: scores, then weights
    bias: Any  # fp32 [rows], the query's product with the keys' center
    peak: Any  # fp32 [rows, up to a multiple of ROWS], largest score so far
    total: Any  # the same, sum of 2^(score - peak)
    mixed: Any  # fp32 [rows, dim], the values' sum under those weights
    queries: Any  # Weights of queries [rows, dim]
    mixing: Any  # Weights of values [ROWS, 64]
    fades: Any  # fp32 [ROWS]
    dots: Any  # int32 [ROWS, the larger of dim and 64]
    codes: Any  # uint8 [2, dim * 64], keys and values, see unpack.py


class Scratch(NamedTuple):
    """Work space of one call."""

    arena: Any  # uint8, what the addresses point into
    at: Places
    weights: Any  # fp32 [64], the first row of it
    peak: Any
    total: Any
    mixed: Any
    queries: Any  # fp32 [rows, dim]
    keys: Any  # fp32 [dim, 64], a tile of floats
    values: Any  # fp32 [64, dim]


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
        layout.block_bytes,
    )


@functools.cache
def tables(layout: KvLayout, layer: int) -> Tables:
    # Copies: the sources are read-only, which Numba would compile as another type.
    table = Tables(
        rotation.signs(layout.head_dim).copy(),
        rotation.base(layout.head_dim).copy(),
        np.zeros(2, np.float32),
    )
    codec = layout.planes(layer).codec
    for kind, bits in enumerate((codec.key_bits, codec.value_bits)):
        if bits <= 8:
            table.half_step[kind] = codebook.step(bits) / 2
    return table


@functools.cache
def constants(layout: KvLayout, layer: int) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """A Geometry and Tables as plain tuples, of which `named` makes what kernels read: to see what
    a named tuple holds costs Numba 20 us of a call that finds the caches empty."""
    return tuple(geometry(layout, layer)), tuple(tables(layout, layer))


@kernel
def named(constants: Any) -> Any:
    at, (signs, base, half_step) = constants
    geo = Geometry(at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8])
    return geo, Tables(signs, base, half_step)


@kernel
def pool_of(blocks: Any) -> Any:
    return Pool(blocks, blocks.view(np.uint16), blocks.view(np.float32))


@kernel
def _take(free: int, count: int, size: int) -> Any:
    """Where the next array goes, after one of `count` elements at `free`: on a cache line."""
    return free + -(-count * size // _LINE) * _LINE


@kernel
def _place_weights(free: int, rows: int, length: int) -> Any:
    wide = free
    high = _take(wide, rows * length, 2)
    low = _take(high, rows * length, 1)
    unit = _take(low, rows * length, 1)
    offset = _take(unit, rows, 4)
    return Weights(wide, high, low, unit, offset, np.int64(length)), _take(offset, rows, 4)


@kernel
def make_scratch(dim: int, rows: int) -> Any:
    """Tiles start as zeros: lanes past a tail's end are computed on, then ignored."""
    most = max(dim, BLOCK_SIZE)
    mixed = np.empty((rows, dim), np.float32)
    whole = -(-rows // ROWS) * ROWS
    peak, total = np.full(whole, _NEVER), np.zeros(whole, np.float32)
    weights = np.zeros((ROWS, BLOCK_SIZE), np.float32)
    room = 2 * dim * BLOCK_SIZE
    arena = np.empty(20 * _LINE + 4 * rows * (dim + 4) + ROWS * most * 12 + room, np.uint8)
    bias = _take(arena.ctypes.data + _LINE - 1 - (arena.ctypes.data - 1) % _LINE, 0, 1)
    queries, free = _place_weights(_take(bias, rows, 4), rows, dim)
    mixing, fades = _place_weights(free, ROWS, BLOCK_SIZE)
    dots = _take(fades, ROWS, 4)
    places = Places(
        weights.ctypes.data, bias, peak.ctypes.data, total.ctypes.data,
        mixed.ctypes.data, queries, mixing, fades, dots, _take(dots, ROWS * most, 4),
    )  # fmt: skip
    return Scratch(
        arena,
        places,
        weights[0],
        peak[:rows],
        total[:rows],
        mixed,
        np.empty((rows, dim), np.float32),
        np.zeros((dim, BLOCK_SIZE), np.float32),
        np.zeros((BLOCK_SIZE, dim), np.float32),
    )


@kernel
def _read_floats(pool: Any, block: int, offset: int, bits: int, out: Any) -> None:
    """Reads out.size floats of 16 or 32 bits, `offset` bytes into a block. out: contiguous."""
    for i in range(out.size):
        if bits == 16:
            out[i] = from_half(pool.halves[block, offset // 2 + i])
        else:
            out[i] = pool.floats[block, offset // 4 + i]


@kernel
def plane_at(geo: Any, kind: int, head: int) -> Any:
    """Where one head's codes begin, in bytes from the block's start."""
    at: int
    if kind:
        at = geo.value_codes + head * head_bytes(BLOCK_SIZE, geo.dim, geo.value_bits)
    else:
        at = geo.key_codes + head * head_bytes(geo.dim, BLOCK_SIZE, geo.key_bits)
    return at


@kernel
def read_floats(geo: Any, pool: Any, block: int, head: int, scratch: Any) -> None:
    """Fills the tile with one KV head of a block of floats."""
    size = BLOCK_SIZE * geo.dim
    for kind in range(2):
        tile = (scratch.values if kind else scratch.keys).reshape(size)
        bits = geo.value_bits if kind else geo.key_bits
        _read_floats(pool, block, plane_at(geo, kind, head), bits, tile)
