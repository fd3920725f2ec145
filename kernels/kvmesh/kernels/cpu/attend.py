"""Attention of up to 64 queries of one sequence over its sealed blocks and its own tail.

For one query, everything is added up in one order: within a score dim by dim, within a block token
by token (the softmax's sum by halves), the blocks from first to last, the tail merged at the end.
A query never sees how many others share the call, so its result does not depend on them.
"""

from typing import Any, NamedTuple

import numpy as np

from kvmesh.kernels.cpu.dot import dot_rows, set_weights
from kvmesh.kernels.cpu.floats import mix, scaled, score
from kvmesh.kernels.cpu.hadamard import hadamard
from kvmesh.kernels.cpu.jit import kernel
from kvmesh.kernels.cpu.lanes import (
    accumulate,
    add_products,
    exponents,
    fetch_halves,
    largest,
)
from kvmesh.kernels.cpu.simd import ROWS
from kvmesh.kernels.cpu.softmax import score_and_weigh_rows, score_rows, weigh_rows
from kvmesh.kernels.cpu.tile import plane_at, read_floats
from kvmesh.kernels.cpu.unpack import MANY_ROWS, unpacked
from kvmesh.kernels.cpu.vectors import exp2, get, put
from kvmesh.kernels.layout import BLOCK_SIZE

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_NEVER = np.float32(-np.inf)
LOG2E = np.float32(np.log2(np.e))
_MINUS_2_LOG2E = np.float32(-2 * np.log2(np.e))


class View(NamedTuple):
    """What a row's scores go through before the softmax; 0 turns each of the first two off."""

    cap: Any  # fp32, times LOG2E as scores are: they become cap * tanh(score / cap)
    window: Any  # int64: a query sees so many tokens, itself included
    kept: Any  # int64: and the first so many of its sequence
    query: Any  # int64, the position of row 0's query
    group: Any  # int64, rows of one query


PLAIN = View(_ZERO, np.int64(0), np.int64(0), np.int64(0), np.int64(1))


@kernel
def _look(scores: int, view: Any, row: int, start: int) -> None:
    """Caps 64 scores and hides what the row must not see. start: position of the first token."""
    if view.cap > _ZERO:
        for t in range(BLOCK_SIZE):
            # tanh by exp of what is not positive: 1 - 2 e / (1 + e), e = exp(-2 |x|)
            x = get(scores, t) / view.cap
            e = exp2(_MINUS_2_LOG2E * abs(x))
            size = view.cap * ((_ONE - e) / (_ONE + e))
            put(scores, t, size if x >= _ZERO else -size)
    if view.window > 0:
        oldest = view.query + row // view.group - view.window + 1
        for t in range(BLOCK_SIZE):
            if view.kept <= start + t < oldest:
                put(scores, t, _NEVER)


@kernel
def _weigh(at: Any, scores: int, row: int) -> Any:
    """One step of online softmax: 64 scores become weights 2^(score - peak).

    Returns what the row's sum so far is to be multiplied by.
    """
    before = get(at.peak, row)
    peak = largest(scores, before)
    if peak == _NEVER:  # nothing is seen yet
        for t in range(BLOCK_SIZE):
            put(scores, t, _ZERO)
        return _ONE
    fade = exp2(before - peak)
    total = exponents(scores, peak)
    put(at.peak, row, peak)
    put(at.total, row, get(at.total, row) * fade + total)
    return fade


@kernel
def _absorb_floats(scratch: Any, row: int, view: Any, start: int) -> None:
    """Adds a tile of floats to a row's state."""
    own, mixed = scratch.queries[row], scratch.mixed[row]
    score(own.ctypes.data, scratch.keys.ctypes.data, scratch.at.weights, own.size)
    _look(scratch.at.weights, view, row, start)
    fade = _weigh(scratch.at, scratch.at.weights, row)
    scaled(mixed.ctypes.data, fade, mixed.ctypes.data, mixed.size)
    values = scratch.values.ctypes.data
    mix(scratch.at.weights, values, mixed.size, BLOCK_SIZE, mixed.ctypes.data, mixed.size)


@kernel
def _absorb_rows(
    geo: Any, codes: Any, scales: Any, at: Any, rows: Any, view: Any, start: int
) -> None:
    """Adds one head of a block to `rows` (first, count), see `_absorb_codes`.

    Softmax is of ROWS rows: those past the end are there, and no one's.
    """
    (keys, values), ((key_scales, key_unit), (value_scales, value_unit)) = codes, scales
    first, count = rows
    queries, mixing = at.queries, at.mixing
    stride = max(geo.dim, BLOCK_SIZE)
    dot_rows(keys[0], keys[1], queries, rows, at.dots, BLOCK_SIZE, stride)
    units, offsets = queries.unit + 4 * first, queries.offset + 4 * first
    bias, peak, total = at.bias + 4 * first, at.peak + 4 * first, at.total + 4 * first
    if view.cap > _ZERO or view.window > 0:
        score_rows(at.dots, stride, key_scales, key_unit, units, offsets, bias, at.weights)
        for i in range(count):
            _look(at.weights + 4 * BLOCK_SIZE * i, view, first + i, start)
        weigh_rows(
            at.weights, value_scales, peak, total, at.fades,
            mixing.wide, mixing.high, mixing.low, mixing.unit, mixing.offset,
        )  # fmt: skip
    else:
        score_and_weigh_rows(
            at.dots, stride, key_scales, key_unit, units, offsets, bias, value_scales,
            peak, total, at.fades, mixing.wide, mixing.high, mixing.low, mixing.unit, mixing.offset,
        )  # fmt: skip
    dot_rows(values[0], values[1], mixing, (0, count), at.dots, geo.dim, stride)
    accumulate(
        at.dots, stride, at.mixed + 4 * geo.dim * first, geo.dim, count, value_unit,
        mixing.unit, mixing.offset, at.fades,
    )  # fmt: skip


@kernel
def _absorb_codes(
    geo: Any, units: Any, places: Any, head: int, rows: int, at: Any, view: Any, start: int
) -> None:
    """Adds one head of a block. units: half steps of keys and values; places: addresses of the
    block, and of the two that are read next."""
    here, soon, later = places
    keys, values = plane_at(geo, 0, head), plane_at(geo, 1, head)
    key_scales = geo.key_scales + head * BLOCK_SIZE * 2
    value_scales = geo.value_scales + head * BLOCK_SIZE * 2
    fetch_halves(soon + key_scales)
    fetch_halves(soon + value_scales)
    key_codes = geo.key_bits, (here + keys, soon + keys, later + keys)
    value_codes = geo.value_bits, (here + values, soon + values, later + values)
    if rows >= MANY_ROWS:
        key_codes = unpacked(*key_codes, at.codes, geo.dim, BLOCK_SIZE)
        room = at.codes + geo.dim * BLOCK_SIZE
        value_codes = unpacked(*value_codes, room, BLOCK_SIZE, geo.dim)
    codes = key_codes, value_codes
    scales = (here + key_scales, units[0]), (here + value_scales, units[1])
    for first in range(0, rows, ROWS):
        _absorb_rows(geo, codes, scales, at, (first, min(ROWS, rows - first)), view, start)


@kernel
def absorb(
    geo: Any, table: Any, pool: Any, blocks: Any, starts: Any, head: int, rows: int, scratch: Any,
    view: Any,
) -> None:  # fmt: skip
    """Adds one KV head of sealed blocks, their first tokens at `starts`, to every row's state."""
    at, stride = scratch.at, pool.octets.shape[1]
    base = pool.octets.ctypes.data
    units = table.half_step[0], table.half_step[1]
    for b in range(blocks.size):
        start = starts[b]
        newest = start + BLOCK_SIZE
        if view.window > 0 and newest <= view.query - view.window + 1 and start >= view.kept:
            continue  # out of the first query's window, and so of all
        if geo.key_bits <= 8:
            soon, later = blocks[min(b + 1, blocks.size - 1)], blocks[min(b + 2, blocks.size - 1)]
            places = base + blocks[b] * stride, base + soon * stride, base + later * stride
            _absorb_codes(geo, units, places, head, rows, at, view, start)
        else:
            read_floats(geo, pool, blocks[b], head, scratch)
            for row in range(rows):
                _absorb_floats(scratch, row, view, start)


@kernel
def start_row(geo: Any, table: Any, query: Any, center: Any, scratch: Any, row: int) -> None:
    """Scales one query, and rotates it if the keys are.

    Scores are kept times log2(e), so that a softmax takes powers of two.
    """
    own = scratch.queries[row]
    norm = np.float32(1.0 / np.sqrt(geo.dim))
    scale = norm * LOG2E
    bias = _ZERO
    scaled(query.ctypes.data, scale, own.ctypes.data, geo.dim)
    if geo.key_bits <= 8:
        bias = add_products(own.ctypes.data, center.ctypes.data, geo.dim)
        for j in range(geo.dim):
            own[j] = own[j] * table.signs[j]
        hadamard(own, table.base)
        scaled(own.ctypes.data, norm, own.ctypes.data, geo.dim)  # of H
        set_weights(scratch.at.queries, row, own.ctypes.data)
    put(scratch.at.bias, row, bias)


@kernel
def empty_rows(scratch: Any, count: int) -> None:
    """The state of the first rows, before anything was added."""
    scratch.peak[:count] = _NEVER
    scratch.total[:count] = _ZERO
    scratch.mixed[:count] = _ZERO


@kernel
def unrotate(geo: Any, table: Any, center: Any, mixed: Any, total: Any) -> None:
    """Takes a row's sum of values back to V's own space: D H x, plus the center once per weight."""
    if geo.value_bits <= 8:
        norm = np.float32(1.0 / np.sqrt(geo.dim))
        hadamard(mixed, table.base)
        for j in range(geo.dim):
            mixed[j] = mixed[j] * (table.signs[j] * norm) + total * center[j]


@kernel
def read_tail(tail: Any, head: int, count: int, scratch: Any) -> None:
    """Puts the keys of the first `count` tokens of fp32 [2, 64, heads, dim] into the tile."""
    for t in range(count):
        for j in range(tail.shape[3]):
            scratch.keys[j, t] = tail[0, t, head, j]


@kernel
def absorb_tail(
    query: Any, values: Any, count: int, scratch: Any, row: int, view: Any, start: int
) -> None:
    """Adds the first `count` tokens of the tile's keys and values [64, dim], which are in K's and
    V's own space, to a row whose sum is in V's own space. start: position of the first."""
    own = scratch.queries[row]
    scale = np.float32(1.0 / np.sqrt(own.size)) * LOG2E
    scaled(query.ctypes.data, scale, own.ctypes.data, own.size)
    score(own.ctypes.data, scratch.keys.ctypes.data, scratch.at.weights, own.size)
    _look(scratch.at.weights, view, row, start)
    for t in range(count, BLOCK_SIZE):
        scratch.weights[t] = _NEVER
    fade = _weigh(scratch.at, scratch.at.weights, row)
    mixed = scratch.mixed[row]
    scaled(mixed.ctypes.data, fade, mixed.ctypes.data, mixed.size)
    mix(
        scratch.at.weights, values.ctypes.data, values.strides[0] // 4, count,
        mixed.ctypes.data, mixed.size,
    )  # fmt: skip


@kernel
def attend(
    geo: Any, table: Any, pool: Any, blocks: Any, tail: Any, centers: Any,
    queries: Any, first: int, scratch: Any, out: Any, heads: Any,
) -> None:  # fmt: skip
    """Attends queries [n, query heads, dim], n <= 64, that lie in one block.

    blocks: int32 [any], the sealed blocks before theirs; tail: fp32 [2, 64, heads, dim], filled up
    to the last query; first: the first query's place in its block; out: like queries; heads: the
    first KV head to attend with, and the end.
    """
    group = queries.shape[1] // geo.heads
    count = queries.shape[0]
    starts = np.zeros(blocks.size, np.int64)  # PLAIN does not look at them
    for head in range(heads[0], heads[1]):
        for i in range(count):
            for g in range(group):
                query = queries[i, head * group + g]
                start_row(geo, table, query, centers[0, head], scratch, i * group + g)
        empty_rows(scratch, count * group)
        absorb(geo, table, pool, blocks, starts, head, count * group, scratch, PLAIN)
        read_tail(tail, head, first + count, scratch)
        values = tail[1, :, head, :]
        for i in range(count):
            for g in range(group):
                row = i * group + g
                if blocks.size:
                    unrotate(geo, table, centers[1, head], scratch.mixed[row], scratch.total[row])
                at = head * group + g
                absorb_tail(queries[i, at], values, first + i + 1, scratch, row, PLAIN, 0)
                total = scratch.total[row]
                for j in range(geo.dim):
                    out[i, at, j] = scratch.mixed[row, j] / total
