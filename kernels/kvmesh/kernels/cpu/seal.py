"""Encodes a full tail into the planes of a block, byte for byte as reference.py does.

Works on tiles [dim][64 tokens], so that every step is a loop over 64 tokens with an order of
arithmetic per token that is fixed: sums over dims by halves (reference.py says how).
"""

from typing import Any

import numpy as np

from kvmesh.kernels.codebook import GRID_MIDDLE, STEPS_8
from kvmesh.kernels.cpu.jit import kernel, to_half
from kvmesh.kernels.cpu.tile import plane_at
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


@kernel
def _sum_by_halves(rows: Any, count: int) -> None:
    """Leaves the sum over rows [count, 64] in row 0."""
    while count % 2 == 0:
        count //= 2
        for j in range(count):
            for t in range(BLOCK_SIZE):
                rows[j, t] = rows[j, t] + rows[j + count, t]
    for j in range(1, count):
        for t in range(BLOCK_SIZE):
            rows[0, t] = rows[0, t] + rows[j, t]


@kernel
def _rotate(tile: Any, base: Any, work: Any) -> None:
    """Unnormalised Hadamard transform over the rows of fp32 [dim, 64], in place; work: as tile."""
    count = base.shape[0]
    columns = tile.shape[0] // count
    span = 1
    while span < columns:
        for start in range(0, tile.shape[0], 2 * span):
            for j in range(start, start + span):
                for t in range(BLOCK_SIZE):
                    low = tile[j, t]
                    high = tile[j + span, t]
                    tile[j, t] = low + high
                    tile[j + span, t] = low - high
        span *= 2
    if count > 1:
        for j in range(tile.shape[0]):
            for t in range(BLOCK_SIZE):
                work[j, t] = tile[j, t]
        for j in range(tile.shape[0]):
            for t in range(BLOCK_SIZE):
                tile[j, t] = base[j // columns, 0] * work[j % columns, t]
            for i in range(1, count):
                sign = base[j // columns, i]
                for t in range(BLOCK_SIZE):
                    tile[j, t] = tile[j, t] + sign * work[i * columns + j % columns, t]


@kernel
def _to_steps(tile: Any, work: Any, codes: Any, unbiased: bool) -> None:
    """Codes uint8 [dim, 64] of 8 bits; work gets what a or e is the mean of (see reference)."""
    for j in range(tile.shape[0]):
        for t in range(BLOCK_SIZE):
            passed = min(max(np.ceil(tile[j, t] * _STEPS) + _BELOW, _ZERO), _MOST)
            codes[j, t] = np.uint8(np.int32(passed))
            level = (passed - _MIDDLE) * _STEP
            work[j, t] = level * (tile[j, t] if unbiased else level)


@kernel
def _to_levels(
    tile: Any, work: Any, codes: Any, unbiased: bool, bits: int, table: Any, kind: int
) -> None:
    """Codes of 1 to 4 bits, as `_to_steps`."""
    passed = np.empty(BLOCK_SIZE, np.uint8)
    for j in range(tile.shape[0]):
        passed[:] = np.uint8(0)
        for k in range((1 << bits) - 1):
            border = table.thresholds[kind, k]
            for t in range(BLOCK_SIZE):
                passed[t] += np.uint8(tile[j, t] > border)
        for t in range(BLOCK_SIZE):
            code = table.stored[kind, passed[t]]
            level = table.levels[kind, code]
            codes[j, t] = code
            work[j, t] = level * (tile[j, t] if unbiased else level)


@kernel
def _encode(tile: Any, work: Any, codes: Any, kind: int, bits: int, table: Any) -> Any:
    """Encodes centered vectors, tile fp32 [dim, 64], destroyed, to codes uint8 [dim, 64].

    Returns the scales, fp16 bits.
    """
    unbiased = kind == 0
    dim = tile.shape[0]
    for j in range(dim):
        for t in range(BLOCK_SIZE):
            x = min(max(tile[j, t], -_LARGEST), _LARGEST)
            work[j, t] = x * x
            tile[j, t] = x * table.signs[j]
    _sum_by_halves(work, dim)
    norm = np.empty(BLOCK_SIZE, np.float32)
    for t in range(BLOCK_SIZE):
        norm[t] = np.sqrt(work[0, t]) if work[0, t] >= _SMALLEST_NORM2 else _ZERO
    _rotate(tile, table.base, work)
    for t in range(BLOCK_SIZE):
        inverse = _ONE / norm[t] if norm[t] > _ZERO else _ZERO
        for j in range(dim):
            tile[j, t] = tile[j, t] * inverse
    if bits == 8:
        _to_steps(tile, work, codes, unbiased)
    else:
        _to_levels(tile, work, codes, unbiased, bits, table, kind)
    _sum_by_halves(work, dim)
    scales = np.empty(BLOCK_SIZE, np.uint16)
    root = np.float32(1.0 / np.sqrt(dim))
    for t in range(BLOCK_SIZE):
        mean = work[0, t] * np.float32(1.0 / dim)
        strength = max(mean, _WEAKEST) if unbiased else np.sqrt(mean)
        scales[t] = to_half(np.float32(norm[t] * root) / strength)
        if norm[t] == _ZERO:
            codes[:, t] = np.uint8(0)
            scales[t] = np.uint16(0)
    return scales


@kernel
def _write_words(octets: Any, codes: Any, first: int, width: int) -> None:
    """Packs bits [first, first + width) of codes uint8 [length, lanes] along length (block.py).

    A last word that length does not fill is padded with zeros.
    """
    length, lanes = codes.shape
    span = 32 // width
    mask = np.uint8((1 << width) - 1)
    for j in range(-(-length // span) * 4):
        word, octet = divmod(j, 4)
        at = 4 * lanes * word + octet
        start = span * word + octet
        for lane in range(lanes):
            octets[at + 4 * lane] = np.uint8(0)
        for i in range(start, min(start + span, length), 4):
            shift = np.uint8((i - start) // 4 * width)
            for lane in range(lanes):
                octets[at + 4 * lane] |= np.uint8((codes[i, lane] >> first & mask) << shift)


@kernel
def _write_codes(octets: Any, codes: Any, bits: int) -> None:
    """Writes one head's codes uint8 [length, lanes]; 3 bits as magnitudes, then signs."""
    if bits == 3:
        _write_words(octets, codes, 0, 2)
        _write_words(octets[codes.size // 4 :], codes, 2, 1)
    else:
        _write_words(octets, codes, 0, bits)


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
def _finite(tail: Any) -> bool:
    flat = tail.reshape(tail.size)
    bad = 0
    for i in range(flat.size):
        bad += not np.isfinite(flat[i])
    return bad == 0


@kernel
def seal_layer(geo: Any, table: Any, pool: Any, block: int, tail: Any, centers: Any) -> bool:
    """Seals one layer of one full block.

    tail: fp32 [2, 64, heads, dim]; centers: fp32 [2, heads, dim]. Returns False, and leaves the
    block as it was, if the tail holds a NaN or an infinity.
    """
    if not _finite(tail):
        return False
    tile = np.empty((geo.dim, BLOCK_SIZE), np.float32)
    work = np.empty((geo.dim, BLOCK_SIZE), np.float32)
    codes = np.empty((geo.dim, BLOCK_SIZE), np.uint8)
    for kind in range(2):
        bits = geo.value_bits if kind else geo.key_bits
        scales_at = geo.value_scales if kind else geo.key_scales
        for head in range(geo.heads):
            at = plane_at(geo, kind, head)
            rows = tail[kind, :, head, :]
            if bits > 8:
                _write_floats(pool, block, at, bits, rows if kind else rows.T)
                continue
            for t in range(BLOCK_SIZE):
                for j in range(geo.dim):
                    tile[j, t] = rows[t, j] - centers[kind, head, j]
            scales = _encode(tile, work, codes, kind, bits, table)
            if kind:
                _write_codes(pool.octets[block, at:], codes.T, bits)
            else:
                _write_codes(pool.octets[block, at:], codes, bits)
            for t in range(BLOCK_SIZE):
                pool.halves[block, scales_at // 2 + head * BLOCK_SIZE + t] = scales[t]
    return True
