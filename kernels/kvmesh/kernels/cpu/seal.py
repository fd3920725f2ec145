"""Encodes a full tail into the planes of a block, byte for byte as reference.py does.

Works on tiles [dim][64 tokens], so that every step is a loop over 64 tokens with an order of
arithmetic per token that is fixed: sums over dims by halves (reference.py says how).
"""

from typing import Any

import numpy as np

from kvmesh.kernels.cpu.jit import kernel, to_half
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.kernels.reference import LARGEST, SMALLEST_NORM2, WEAKEST

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_LARGEST = np.float32(LARGEST)
_SMALLEST_NORM2 = np.float32(SMALLEST_NORM2)
_WEAKEST = np.float32(WEAKEST)


@kernel
def _sum_by_halves(rows: Any, count: int) -> None:
    """Leaves the sum over rows [count, 64] in row 0."""
    half = count // 2
    while half >= 1:
        for j in range(half):
            for t in range(BLOCK_SIZE):
                rows[j, t] = rows[j, t] + rows[j + half, t]
        half //= 2


@kernel
def _rotate(tile: Any) -> None:
    """Unnormalised Walsh-Hadamard transform over the rows of fp32 [dim, 64], in place."""
    span = 1
    while span < tile.shape[0]:
        for start in range(0, tile.shape[0], 2 * span):
            for j in range(start, start + span):
                for t in range(BLOCK_SIZE):
                    low = tile[j, t]
                    high = tile[j + span, t]
                    tile[j, t] = low + high
                    tile[j + span, t] = low - high
        span *= 2


@kernel
def _quantize(tile: Any, work: Any, codes: Any, unbiased: bool, table: Any) -> None:
    """Turns tile [dim, 64] into codes uint8 [dim, 64]; work's row 0 gets a or e (see reference)."""
    passed = np.empty(BLOCK_SIZE, np.uint8)
    for j in range(tile.shape[0]):
        passed[:] = np.uint8(0)
        for k in range(table.thresholds.size):
            border = table.thresholds[k]
            for t in range(BLOCK_SIZE):
                passed[t] += np.uint8(tile[j, t] > border)
        for t in range(BLOCK_SIZE):
            code = table.stored[passed[t]]
            level = table.levels[code]
            codes[j, t] = code
            work[j, t] = level * (tile[j, t] if unbiased else level)
    _sum_by_halves(work, tile.shape[0])


@kernel
def _encode(tile: Any, work: Any, codes: Any, unbiased: bool, table: Any) -> Any:
    """Encodes centered vectors, tile fp32 [dim, 64], destroyed. Returns the scales, fp16 bits."""
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
    _rotate(tile)
    for t in range(BLOCK_SIZE):
        inverse = _ONE / norm[t] if norm[t] > _ZERO else _ZERO
        for j in range(dim):
            tile[j, t] = tile[j, t] * inverse
    _quantize(tile, work, codes, unbiased, table)
    scales = np.empty(BLOCK_SIZE, np.uint16)
    root = np.float32(1.0 / np.sqrt(dim))
    for t in range(BLOCK_SIZE):
        mean = work[0, t] * np.float32(1.0 / dim)
        strength = max(mean, _WEAKEST) if unbiased else np.sqrt(mean)
        scales[t] = to_half(np.float32(norm[t] * root) / strength)
        if norm[t] == _ZERO:
            codes[:, t] = np.uint8(0)
    return scales


@kernel
def _write_codes(geo: Any, octets: Any, offset: int, codes: Any, by_token: bool) -> None:
    """Packs codes uint8 [dim, 64] two to a byte, along tokens (keys) or dims (values)."""
    if by_token:
        for j in range(geo.dim):
            for i in range(BLOCK_SIZE // 2):
                packed = codes[j, 2 * i] | np.uint8(codes[j, 2 * i + 1] << 4)
                octets[offset + j * (BLOCK_SIZE // 2) + i] = packed
    else:
        for i in range(geo.dim // 2):
            for t in range(BLOCK_SIZE):
                packed = codes[2 * i, t] | np.uint8(codes[2 * i + 1, t] << 4)
                octets[offset + t * (geo.dim // 2) + i] = packed


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
        plane = geo.value_codes if kind else geo.key_codes
        scales_at = geo.value_scales if kind else geo.key_scales
        for head in range(geo.heads):
            at = plane + head * BLOCK_SIZE * geo.dim * bits // 8
            rows = tail[kind, :, head, :]
            if bits > 8:
                _write_floats(pool, block, at, bits, rows if kind else rows.T)
                continue
            for t in range(BLOCK_SIZE):
                for j in range(geo.dim):
                    tile[j, t] = rows[t, j] - centers[kind, head, j]
            scales = _encode(tile, work, codes, kind == 0, table)
            _write_codes(geo, pool.octets[block], at, codes, kind == 0)
            for t in range(BLOCK_SIZE):
                pool.halves[block, scales_at // 2 + head * BLOCK_SIZE + t] = scales[t]
    return True
