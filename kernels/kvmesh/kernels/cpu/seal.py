"""Encodes a full tail into the planes of a block, byte for byte as reference.py does.

Strip by strip of its tokens (strip.py): what a strip needs stays in the first cache.
"""

from typing import Any, NamedTuple

import numpy as np

from kvmesh.kernels.cpu.encode import QUADS, encode, pack, turn
from kvmesh.kernels.cpu.jit import kernel, to_half
from kvmesh.kernels.cpu.strip import (
    finite,
    load_strip,
    norms,
    rotate,
    scales,
    sum_by_halves,
    sum_squares,
)
from kvmesh.kernels.cpu.tile import plane_at
from kvmesh.kernels.cpu.vectors import WIDE
from kvmesh.kernels.layout import BLOCK_SIZE

_LINE = 64  # bytes
_FLOAT = 4


class Space(NamedTuple):
    """Addresses of the work space of one seal."""

    strip: Any  # fp32 [dim, WIDE]
    work: Any  # the same
    norm: Any  # fp32 [WIDE]
    inverse: Any  # fp32 [WIDE], 1 / norm
    keep: Any  # int32 [WIDE], all ones, or zero for a zero vector
    quads: Any  # int32 [rows, 64], see encode.py; rows past dim / 4 are zero
    turned: Any  # int32 [16, 4 rows]
    rows: Any  # int64, dim / 4 up to a multiple of QUADS


@kernel
def _make_space(dim: int) -> Any:
    rows = -(-dim // (4 * QUADS)) * QUADS
    strip, quads = dim * WIDE * _FLOAT, rows * BLOCK_SIZE * _FLOAT
    arena = np.zeros(2 * strip + 2 * quads + 4 * _LINE, np.uint8)
    first = -(-arena.ctypes.data // _LINE) * _LINE
    small = first + 2 * strip
    planes = small + 3 * _LINE
    space = Space(
        first, first + strip, small, small + _LINE, small + 2 * _LINE, planes, planes + quads,
        np.int64(rows),
    )  # fmt: skip
    return arena, space


@kernel
def _encode_head(
    kind: int, bits: int, x: Any, stride: int, center: int, table: Any, places: Any, space: Any,
    dim: int,
) -> None:  # fmt: skip
    """One head's 64 vectors, `stride` elements apart. places: addresses of codes and scales."""
    codes, scales_at = places
    signs, base, order = table.signs.ctypes.data, table.base.ctypes.data, table.base.shape[0]
    root, share = np.float32(1.0 / np.sqrt(dim)), np.float32(1.0 / dim)
    keys = 1 - kind
    for t in range(0, BLOCK_SIZE, WIDE):
        rows = x + t * stride * _FLOAT
        load_strip(rows, stride, center, signs, space.work, space.strip, dim)
        sum_squares(space.strip, space.work, dim)
        norms(space.work, space.norm, space.inverse, space.keep)
        turned = rotate(space.strip, space.work, dim, base, order)
        quads = space.quads + t * _FLOAT
        encode(kind, bits, turned, (space.inverse, space.keep), quads, dim)
        sum_by_halves(turned, dim)
        scales(turned, space.norm, scales_at + 2 * t, root, share, keys)
    if kind:
        turn(space.quads, space.turned, space.rows)
        pack(bits, space.turned, codes, BLOCK_SIZE, dim, 4 * space.rows)
    else:
        pack(bits, space.quads, codes, dim, BLOCK_SIZE, BLOCK_SIZE)


@kernel
def _write_floats(pool: Any, block: int, offset: int, bits: int, rows: Any) -> None:
    """Stores fp32 [n, m] (any strides) as fp16 or fp32."""
    width = rows.shape[1]
    for i in range(rows.shape[0]):
        for j in range(width):
            if bits == 16:
                pool.halves[block, offset // 2 + i * width + j] = to_half(rows[i, j])
            else:
                pool.floats[block, offset // 4 + i * width + j] = rows[i, j]


@kernel
def seal_layer(
    geo: Any, table: Any, pool: Any, block: int, tail: Any, centers: Any, heads: Any
) -> bool:
    """Seals some heads of one layer of one full block.

    tail: fp32 [2, 64, heads, dim]; centers: fp32 [2, heads, dim]; heads: the first to seal, and
    the end. All contiguous. Returns False, and leaves them as they were, if one holds a NaN or an
    infinity.
    """
    dim = geo.dim
    stride = geo.heads * dim
    first = heads[0] * dim * _FLOAT
    kinds = BLOCK_SIZE * stride * _FLOAT
    x = tail.ctypes.data + first
    for kind in range(2):
        if not finite(x + kind * kinds, stride, (heads[1] - heads[0]) * dim):
            return False
    arena, space = _make_space(dim)
    out = pool.octets.ctypes.data + block * pool.octets.shape[1]
    for kind in range(2):
        bits = geo.value_bits if kind else geo.key_bits
        scales_at = out + (geo.value_scales if kind else geo.key_scales)
        for head in range(heads[0], heads[1]):
            at = plane_at(geo, kind, head)
            if bits > 8:
                rows = tail[kind, :, head, :]
                _write_floats(pool, block, at, bits, rows if kind else rows.T)
                continue
            places = out + at, scales_at + head * BLOCK_SIZE * 2
            center = centers.ctypes.data + (kind * stride + head * dim) * _FLOAT
            vectors = tail.ctypes.data + kind * kinds + head * dim * _FLOAT
            _encode_head(kind, bits, vectors, stride, center, table, places, space, dim)
    return bool(arena.size)  # which so lives until here
