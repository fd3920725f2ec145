"""Encodes a full tail into the planes of a block, byte for byte as reference.py does.

Works on tiles [dim][64 tokens], so that every step is a loop over 64 tokens with an order of
arithmetic per token that is fixed: sums over dims by halves (reference.py says how). Codes are
32-bit integers in the registers and become words (block.py) by shifts of whole rows of lanes.
"""

from typing import Any, NamedTuple

import numpy as np

from kvmesh.kernels.codebook import GRID_MIDDLE, STEPS_8
from kvmesh.kernels.cpu.jit import kernel, to_half
from kvmesh.kernels.cpu.rows import rotate, sum_by_halves
from kvmesh.kernels.cpu.tile import plane_at
from kvmesh.kernels.cpu.transpose import transpose
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.kernels.reference import LARGEST, SMALLEST_NORM2, WEAKEST

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_LARGEST = np.float32(LARGEST)
_SMALLEST_NORM2 = np.float32(SMALLEST_NORM2)
_WEAKEST = np.float32(WEAKEST)
_STEPS = np.float32(STEPS_8)
_STEP = np.float32(1 / STEPS_8)
_MIDDLE = np.float32(GRID_MIDDLE)
_BELOW = np.float32(127.0)
_MOST = np.float32(255.0)
_SIZE = np.int32(0x7FFFFFFF)  # of a float: its bits without the sign, which order as sizes do
_INFINITE = np.int32(0x7F800000)
_NO = np.int32(0)
_YES = np.int32(1)


class Space(NamedTuple):
    """Work space of one seal."""

    rows: Any  # fp32 [64, dim], centered
    tile: Any  # fp32 [dim, 64], rotated
    work: Any  # fp32 [dim, 64], what is summed over dims
    codes: Any  # int32 [dim, 64]
    turned: Any  # int32 [64, dim], the same
    inverse: Any  # fp32 [64], 1 / norm
    keep: Any  # int32 [64], all ones, or zero for a zero vector
    norm: Any  # fp32 [64]


@kernel
def make_space(dim: int) -> Any:
    return Space(
        np.empty((BLOCK_SIZE, dim), np.float32),
        np.empty((dim, BLOCK_SIZE), np.float32),
        np.empty((dim, BLOCK_SIZE), np.float32),
        np.empty((dim, BLOCK_SIZE), np.int32),
        np.empty((BLOCK_SIZE, dim), np.int32),
        np.empty(BLOCK_SIZE, np.float32),
        np.empty(BLOCK_SIZE, np.int32),
        np.empty(BLOCK_SIZE, np.float32),
    )


@kernel
def _to_steps(z: Any, codes: Any, work: Any, unbiased: bool, space: Any) -> None:
    """One row of 8-bit codes; work gets what a or e is the mean of (see reference)."""
    for t in range(BLOCK_SIZE):
        x = z[t] * space.inverse[t]
        passed = min(max(np.ceil(x * _STEPS) + _BELOW, _ZERO), _MOST)
        codes[t] = np.int32(passed) & space.keep[t]
        level = (passed - _MIDDLE) * _STEP
        work[t] = level * (x if unbiased else level)


@kernel
def _to_levels(
    z: Any, codes: Any, work: Any, unbiased: bool, space: Any, half: Any, borders: Any,
    ladder: Any, step: Any,
) -> None:  # fmt: skip
    """As `_to_steps`, for codes of 1 to 4 bits.

    The magnitude is the number of positive borders below |x|, or not above it if x is negative;
    ladder holds 2 u - 255 of the smallest magnitude, then what each border adds to it. Products
    with step are exact.
    """
    b0, b1, b2, b3 = borders[0], borders[1], borders[2], borders[3]
    b4, b5, b6 = borders[4], borders[5], borders[6]
    g0, g1, g2, g3 = ladder[0], ladder[1], ladder[2], ladder[3]
    g4, g5, g6, g7 = ladder[4], ladder[5], ladder[6], ladder[7]
    for t in range(BLOCK_SIZE):
        x = z[t] * space.inverse[t]
        negative = _NO if x > _ZERO else _YES
        size = np.int32((np.float32(x).view(np.int32) & _SIZE) + negative)
        m0, m1, m2, m3 = size > b0, size > b1, size > b2, size > b3
        m4, m5, m6 = size > b4, size > b5, size > b6
        low = np.int32(m0) + np.int32(m1) + np.int32(m2) + np.int32(m3)
        code = low + np.int32(m4) + np.int32(m5) + np.int32(m6) + half * negative
        codes[t] = np.int32(code) & space.keep[t]
        above = g0 + (g1 if m0 else _NO) + (g2 if m1 else _NO) + (g3 if m2 else _NO)
        above = above + (g4 if m3 else _NO) + (g5 if m4 else _NO)
        above = above + (g6 if m5 else _NO) + (g7 if m6 else _NO)
        level = np.float32(np.int32(above)) * step
        level = level if x > _ZERO else -level
        work[t] = level * (x if unbiased else level)


@kernel
def _center(tail: Any, kind: int, head: int, center: Any, table: Any, space: Any) -> None:
    """Fills the tile with one head's vectors: centered, clamped, with their signs."""
    dim = center.size
    for t in range(BLOCK_SIZE):
        x = tail[kind, t, head]
        row = space.rows[t]
        for j in range(dim):
            row[j] = min(max(x[j] - center[j], -_LARGEST), _LARGEST) * table.signs[j]
    transpose(space.rows.ctypes.data, space.tile.ctypes.data, BLOCK_SIZE, dim)


@kernel
def _norms(space: Any) -> None:
    tile, work, norm = space.tile, space.work, space.norm
    for j in range(tile.shape[0]):
        x, square = tile[j], work[j]
        for t in range(BLOCK_SIZE):
            square[t] = x[t] * x[t]
    sum_by_halves(work, tile.shape[0])
    for t in range(BLOCK_SIZE):
        norm[t] = np.sqrt(work[0, t]) if work[0, t] >= _SMALLEST_NORM2 else _ZERO
        space.inverse[t] = _ONE / norm[t] if norm[t] > _ZERO else _ZERO
        space.keep[t] = -_YES if norm[t] > _ZERO else _NO


@kernel
def _encode(space: Any, kind: int, bits: int, table: Any, scales: Any) -> None:
    """Encodes the tile, which is destroyed, to space.codes; writes the scales' fp16 bits [64]."""
    unbiased = kind == 0
    tile, work = space.tile, space.work
    dim = tile.shape[0]
    _norms(space)
    rotate(tile, table.base, work)
    half = np.int32(1 << (bits - 1))
    for j in range(dim):
        if bits == 8:
            _to_steps(tile[j], space.codes[j], work[j], unbiased, space)
        else:
            _to_levels(
                tile[j], space.codes[j], work[j], unbiased, space, half,
                table.borders[kind], table.ladder[kind], table.half_step[kind],
            )  # fmt: skip
    sum_by_halves(work, dim)
    root = np.float32(1.0 / np.sqrt(dim))
    for t in range(BLOCK_SIZE):
        mean = work[0, t] * np.float32(1.0 / dim)
        strength = max(mean, _WEAKEST) if unbiased else np.sqrt(mean)
        scale = to_half(np.float32(space.norm[t] * root) / strength)
        scales[t] = scale if space.norm[t] > _ZERO else np.uint16(0)


@kernel
def _write_words(words: Any, codes: Any, first: int, width: int) -> None:
    """Packs bits [first, first + width) of codes int32 [length, lanes] along length (block.py).

    words: int32 [any]. A last row of words that length does not fill is padded with zeros.
    """
    length, lanes = codes.shape
    span = 32 // width
    mask = np.int32((1 << width) - 1) << np.int32(first)
    for w in range(-(-length // span)):
        row = words[w * lanes : (w + 1) * lanes]
        row[:] = _NO
        for i in range(min(span, length - w * span)):
            code = codes[w * span + i]
            move = np.int64(1) << np.int64(8 * (i % 4) + width * (i // 4))
            factor = np.int32(move)
            for lane in range(lanes):
                row[lane] += np.int32(np.int32((code[lane] & mask) >> first) * factor)


@kernel
def _write_codes(octets: Any, codes: Any, bits: int) -> None:
    """Writes one head's codes int32 [length, lanes]; 3 bits as magnitudes, then signs."""
    length, lanes = codes.shape
    size = octets.size // 4 * 4
    words = octets[:size].view(np.int32)
    if bits == 3:
        _write_words(words, codes, 0, 2)
        _write_words(words[length // 16 * lanes :], codes, 2, 1)
    else:
        _write_words(words, codes, 0, bits)


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
def _finite(tail: Any, heads: Any) -> Any:
    most = _NO
    for kind in range(2):
        for t in range(BLOCK_SIZE):
            flat = tail[kind, t, heads[0] : heads[1]].reshape(-1).view(np.int32)
            for i in range(flat.size):
                most = max(most, flat[i] & _SIZE)
    return most < _INFINITE


@kernel
def seal_layer(
    geo: Any, table: Any, pool: Any, block: int, tail: Any, centers: Any, heads: Any
) -> bool:
    """Seals some heads of one layer of one full block.

    tail: fp32 [2, 64, heads, dim]; centers: fp32 [2, heads, dim]; heads: the first to seal, and
    the end. Returns False, and leaves them as they were, if one holds a NaN or an infinity.
    """
    if not _finite(tail, heads):
        return False
    space = make_space(geo.dim)
    for kind in range(2):
        bits = geo.value_bits if kind else geo.key_bits
        scales_at = (geo.value_scales if kind else geo.key_scales) // 2
        for head in range(heads[0], heads[1]):
            at = plane_at(geo, kind, head)
            if bits > 8:
                rows = tail[kind, :, head, :]
                _write_floats(pool, block, at, bits, rows if kind else rows.T)
                continue
            _center(tail, kind, head, centers[kind, head], table, space)
            first = scales_at + head * BLOCK_SIZE
            _encode(space, kind, bits, table, pool.halves[block, first : first + BLOCK_SIZE])
            if kind:
                transpose(space.codes.ctypes.data, space.turned.ctypes.data, geo.dim, BLOCK_SIZE)
                _write_codes(pool.octets[block, at:], space.turned, bits)
            else:
                _write_codes(pool.octets[block, at:], space.codes, bits)
    return True
