"""Attention of up to 64 queries of one sequence over its sealed blocks and its own tail.

For one query, everything is added up in one order: within a score dim by dim, within a block token
by token (the softmax's sum by halves), the blocks from first to last, the tail merged at the end.
A query never sees how many others share the call, so its result does not depend on them.
"""

from typing import Any, NamedTuple

import numpy as np

from kvmesh.kernels.cpu.dot import dot_rows, set_weights
from kvmesh.kernels.cpu.jit import exp, kernel
from kvmesh.kernels.cpu.simd import ROWS
from kvmesh.kernels.cpu.tile import hadamard, plane_at, read_tile
from kvmesh.kernels.layout import BLOCK_SIZE

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_NEVER = np.float32(-np.inf)


class View(NamedTuple):
    """What a row's scores go through before the softmax; 0 turns each of the first two off."""

    cap: Any  # fp32: scores become cap * tanh(score / cap)
    window: Any  # int64: a query sees so many tokens, itself included
    kept: Any  # int64: and the first so many of its sequence
    query: Any  # int64, the position of row 0's query
    group: Any  # int64, rows of one query


PLAIN = View(_ZERO, np.int64(0), np.int64(0), np.int64(0), np.int64(1))


@kernel
def _score(query: Any, keys: Any, out: Any) -> None:
    """out[t] = sum over j of query[j] * keys[j, t], j ascending; four rows per pass."""
    for t in range(BLOCK_SIZE):
        out[t] = _ZERO
    for j in range(0, query.size, 4):
        q0, q1, q2, q3 = query[j], query[j + 1], query[j + 2], query[j + 3]
        for t in range(BLOCK_SIZE):
            part = out[t] + q0 * keys[j, t]
            part = part + q1 * keys[j + 1, t]
            part = part + q2 * keys[j + 2, t]
            out[t] = part + q3 * keys[j + 3, t]


@kernel
def _mix(weights: Any, values: Any, count: int, out: Any) -> None:
    """out[j] += sum over t < count of weights[t] * values[t, j], t ascending."""
    whole = count // 4 * 4
    for t in range(0, whole, 4):
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        for j in range(out.size):
            part = out[j] + w0 * values[t, j]
            part = part + w1 * values[t + 1, j]
            part = part + w2 * values[t + 2, j]
            out[j] = part + w3 * values[t + 3, j]
    for t in range(whole, count):
        w0 = weights[t]
        for j in range(out.size):
            out[j] = out[j] + w0 * values[t, j]


@kernel
def _largest(scores: Any) -> Any:
    top = _NEVER
    for t in range(BLOCK_SIZE):
        top = max(top, scores[t])
    return top


@kernel
def _to_weights(scores: Any, peak: Any, halves: Any) -> Any:
    """Replaces 64 scores by exp(score - peak); returns their sum, added up by halves."""
    for t in range(BLOCK_SIZE):
        scores[t] = exp(scores[t] - peak)
    half = BLOCK_SIZE // 2
    for t in range(half):
        halves[t] = scores[t] + scores[t + half]
    half //= 2
    while half >= 1:
        for t in range(half):
            halves[t] = halves[t] + halves[t + half]
        half //= 2
    return halves[0]


@kernel
def _look(scores: Any, view: Any, row: int, start: int) -> None:
    """Caps 64 scores and hides what the row must not see. start: position of the first token."""
    if view.cap > _ZERO:
        for t in range(BLOCK_SIZE):
            # tanh by exp of what is not positive: 1 - 2 e / (1 + e), e = exp(-2 |x|)
            x = scores[t] / view.cap
            e = exp(np.float32(-2.0) * abs(x))
            size = view.cap * ((_ONE - e) / (_ONE + e))
            scores[t] = size if x >= _ZERO else -size
    if view.window > 0:
        oldest = view.query + row // view.group - view.window + 1
        for t in range(BLOCK_SIZE):
            if view.kept <= start + t < oldest:
                scores[t] = _NEVER


@kernel
def _weigh(scratch: Any, row: int) -> Any:
    """One step of online softmax: 64 scores become weights exp(score - peak).

    Returns what the row's sum so far is to be multiplied by.
    """
    weights = scratch.weights
    before = scratch.peak[row]
    peak = max(before, _largest(weights))
    if peak == _NEVER:  # nothing is seen yet
        weights[:] = _ZERO
        return _ONE
    fade = exp(before - peak)
    total = _to_weights(weights, peak, scratch.halves)
    scratch.peak[row] = peak
    scratch.total[row] = scratch.total[row] * fade + total
    return fade


@kernel
def _advance(scratch: Any, row: int, view: Any, start: int) -> Any:
    """From a sealed tile's dot products to weights times the values' scales; as `_weigh`."""
    weights = scratch.weights
    bias = scratch.bias[row]
    for t in range(BLOCK_SIZE):
        weights[t] = bias + scratch.key_scales[t] * weights[t]
    _look(weights, view, row, start)
    fade = _weigh(scratch, row)
    for t in range(BLOCK_SIZE):
        weights[t] = weights[t] * scratch.value_scales[t]
    return fade


@kernel
def _absorb_floats(scratch: Any, row: int, view: Any, start: int) -> None:
    """Adds a tile of floats to a row's state."""
    _score(scratch.queries[row], scratch.keys, scratch.weights)
    fade = _advance(scratch, row, view, start)
    mixed = scratch.mixed[row]
    for j in range(mixed.size):
        mixed[j] = mixed[j] * fade
    _mix(scratch.weights, scratch.values, BLOCK_SIZE, mixed)


@kernel
def _absorb_codes(
    geo: Any, table: Any, codes: Any, head: int, scratch: Any, first: int, count: int,
    view: Any, start: int,
) -> None:  # fmt: skip
    """Adds one head of a block, codes uint8 [block bytes], to rows [first, first + count)."""
    dots = scratch.dots
    queries, mixing = scratch.rounded, scratch.mixing
    address = codes.ctypes.data
    keys, values = address + plane_at(geo, 0, head), address + plane_at(geo, 1, head)
    dot_rows(geo.key_bits, keys, queries, first, count, dots, BLOCK_SIZE)
    for i in range(count):
        row = first + i
        unit = queries.unit[row] * table.half_step[0]
        offset = queries.offset[row]
        for t in range(BLOCK_SIZE):
            whole = np.int32(2) * dots[i, t] - offset
            scratch.weights[t] = np.float32(np.int32(whole)) * unit
        scratch.fades[i] = _advance(scratch, row, view, start)
        set_weights(mixing, i, scratch.weights)
    dot_rows(geo.value_bits, values, mixing, 0, count, dots, geo.dim)
    for i in range(count):
        mixed = scratch.mixed[first + i]
        fade = scratch.fades[i]
        unit = mixing.unit[i] * table.half_step[1]
        offset = mixing.offset[i]
        for j in range(geo.dim):
            whole = np.int32(2) * dots[i, j] - offset
            mixed[j] = mixed[j] * fade + np.float32(np.int32(whole)) * unit


@kernel
def absorb(
    geo: Any, table: Any, pool: Any, block: int, head: int, rows: int, scratch: Any, view: Any,
    start: int,
) -> None:  # fmt: skip
    """Adds one KV head of a sealed block, whose first token is at `start`, to every row's state."""
    read_tile(geo, pool, block, head, scratch)
    if geo.key_bits <= 8:
        for first in range(0, rows, ROWS):
            count = min(ROWS, rows - first)
            _absorb_codes(geo, table, pool.octets[block], head, scratch, first, count, view, start)
    else:
        for row in range(rows):
            _absorb_floats(scratch, row, view, start)


@kernel
def start_row(geo: Any, table: Any, query: Any, center: Any, scratch: Any, row: int) -> None:
    """Scales one query, rotates it if the keys are, and empties its state."""
    own = scratch.queries[row]
    scale = np.float32(1.0 / np.sqrt(geo.dim))
    bias = _ZERO
    for j in range(geo.dim):
        own[j] = query[j] * scale
    if geo.key_bits <= 8:
        for j in range(geo.dim):
            bias = bias + own[j] * center[j]
            own[j] = own[j] * table.signs[j]
        hadamard(own, table.base)
        for j in range(geo.dim):
            own[j] = own[j] * scale  # 1/sqrt(dim) again, H's own norm
        set_weights(scratch.rounded, row, own)
    scratch.bias[row] = bias
    scratch.peak[row] = _NEVER
    scratch.total[row] = _ZERO
    scratch.mixed[row, :] = _ZERO


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
    scale = np.float32(1.0 / np.sqrt(own.size))
    for j in range(own.size):
        own[j] = query[j] * scale
    _score(own, scratch.keys, scratch.weights)
    _look(scratch.weights, view, row, start)
    for t in range(count, BLOCK_SIZE):
        scratch.weights[t] = _NEVER
    fade = _weigh(scratch, row)
    mixed = scratch.mixed[row]
    for j in range(mixed.size):
        mixed[j] = mixed[j] * fade
    _mix(scratch.weights, values, count, mixed)


@kernel
def attend(
    geo: Any, table: Any, pool: Any, blocks: Any, tail: Any, centers: Any,
    queries: Any, first: int, scratch: Any, out: Any,
) -> None:  # fmt: skip
    """Attends queries [n, query heads, dim], n <= 64, that lie in one block.

    blocks: int32 [any], the sealed blocks before theirs; tail: fp32 [2, 64, heads, dim], filled up
    to the last query; first: the first query's place in its block; out: like queries.
    """
    group = queries.shape[1] // geo.heads
    count = queries.shape[0]
    for head in range(geo.heads):
        for i in range(count):
            for g in range(group):
                query = queries[i, head * group + g]
                start_row(geo, table, query, centers[0, head], scratch, i * group + g)
        for block in blocks:
            absorb(geo, table, pool, block, head, count * group, scratch, PLAIN, 0)
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
