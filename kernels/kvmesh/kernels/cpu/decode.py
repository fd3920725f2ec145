"""Decode attention over any sealed blocks and a tail, for merging with what others attended to.

Unlike step.py, which runs a model's layer over the whole of a sequence, this takes the blocks that
a process has and says with the output how much weight it stands for: (output, max, log-sum). The
blocks of a sequence are taken SPLIT_BLOCKS at a time, and the partial sums merged from first to
last, then the tail: so a result depends on the sequence alone, not on threads or company.

After other work a call finds the caches empty, and then each function of Python or NumPy that it
touches costs tens of microseconds, as much as attending to hundreds of tokens. So there is one
compiled call, which also checks what is in the arrays, plans, merges, and shares out its items.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cpu.attend import (
    LOG2E,
    View,
    absorb,
    absorb_tail,
    empty_rows,
    read_tail,
    start_row,
    unrotate,
)
from kvmesh.kernels.cpu.decode_inputs import (
    Cache,
    Masking,
    Queries,
    check_ranges,
    checked,
    plan_of,
)
from kvmesh.kernels.cpu.jit import entry, kernel
from kvmesh.kernels.cpu.threads import run_shared
from kvmesh.kernels.cpu.tile import make_scratch, named, pool_of
from kvmesh.kernels.cpu.vectors import exp2, take_one
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.kernels.merge import Partial

SPLIT_BLOCKS = 32  # part of the result: another size adds up in another order
_NEVER = np.float32(-np.inf)
_ZERO = np.float32(0.0)
_LN2 = np.float32(np.log(2))

Floats = npt.NDArray[np.float32]

_PLAIN = Masking()
_NEXT, _MISFIT, _DONE = 0, 1, 2  # in the counters that threads share; from _DONE on, of each pair


def attend_decode(
    cache: Cache, queries: Queries, masking: Masking | None = None, threads: int = 1
) -> Partial:
    """Attention of every query, scores scaled by 1/sqrt(D): fp32 output [S, n, Hq, D], max and
    log_sum [S, n, Hq]. A query that sees nothing has output 0, max -inf and log_sum 0.

    Raises ValueError naming the array that does not fit.
    """
    masking = masking or _PLAIN
    layout = cache.layout
    arrays = checked(cache, queries, masking)
    sequences, n, query_heads, dim = queries.q.shape
    heads = layout.num_kv_heads
    rows = n * query_heads // heads
    chunks = -(-queries.tables.shape[1] // SPLIT_BLOCKS) + 1  # of a pair, the last one for the tail
    items = sequences * heads * chunks
    parts = (
        np.empty((items, rows, dim), np.float32),  # the values' sum, rotated for blocks
        np.empty((items, rows), np.float32),  # largest score
        np.empty((items, rows), np.float32),  # sum of weights
    )
    found = (
        np.empty((sequences, n, query_heads, dim), np.float32),
        np.empty((sequences, n, query_heads), np.float32),
        np.empty((sequences, n, query_heads), np.float32),
    )
    counters = np.zeros(_DONE + sequences * heads, np.int64)
    options = (float(masking.soft_cap), masking.window, masking.kept, SPLIT_BLOCKS)

    def run() -> None:
        _run(cache.constants, cache.blocks, arrays, options, parts, found, counters)

    run_shared(run, min(threads, items))
    if counters[_MISFIT]:
        check_ranges(cache, queries, n)
    return Partial(*found)


@entry
def _run(
    layer_constants: Any, blocks: Any, arrays: Any, options: Any, parts: Any, found: Any,
    counters: Any,
) -> None:  # fmt: skip
    """Takes items until there are none: chunks of a pair of sequence and KV head. Whoever ends the
    last of a pair merges them."""
    geo, table = named(layer_constants)
    plan = plan_of(arrays)
    cap, window, kept, split = options
    chunks = -(-plan.tables.shape[1] // split) + 1
    pairs = plan.q.shape[0] * geo.heads
    group = plan.q.shape[2] // geo.heads
    pool = pool_of(blocks)
    scratch = make_scratch(geo.dim, plan.q.shape[1] * group)
    starts = np.empty(split, np.int64)
    counts = counters.ctypes.data
    started = -1  # the pair whose queries are in scratch
    while True:
        item = take_one(counts, _NEXT)
        if item >= pairs * chunks:
            break
        pair = item // chunks
        s, head, chunk = pair // geo.heads, pair % geo.heads, item % chunks
        view = View(
            np.float32(cap) * LOG2E, np.int64(window), np.int64(kept), plan.positions[s],
            np.int64(group),
        )  # fmt: skip
        if pair != started:
            _start(geo, table, plan, s, head, scratch)
            started = pair
        empty_rows(scratch, scratch.peak.size)
        if chunk == chunks - 1:
            fits = _attend_tail(geo, table, plan, s, head, scratch, view)
        else:
            fits = _attend_chunk(
                geo, table, pool, plan, s, head, scratch, view, chunk * split, starts
            )
        if not fits:
            counters[_MISFIT] = 1
        mixed, peak, total = parts
        for row in range(scratch.peak.size):
            peak[item, row] = scratch.peak[row]
            total[item, row] = scratch.total[row]
            mixed[item, row, :] = scratch.mixed[row]
        if take_one(counts, _DONE + pair) == chunks - 1:
            _merge_pair(geo, table, plan, s, head, pair * chunks, chunks, parts, found)


@kernel
def _start(geo: Any, table: Any, plan: Any, s: int, head: int, scratch: Any) -> None:
    group = plan.q.shape[2] // geo.heads
    for row in range(plan.q.shape[1] * group):
        query = plan.q[s, row // group, head * group + row % group]
        start_row(geo, table, query, plan.centers[0, head], scratch, row)


@kernel
def _attend_chunk(
    geo: Any, table: Any, pool: Any, plan: Any, s: int, head: int, scratch: Any, view: Any,
    first: int, starts: Any,
) -> bool:  # fmt: skip
    """Blocks [first, first + starts.size) of a sequence. Returns False if the tables do not fit."""
    count = plan.counts[s]
    if count < 0 or count > plan.tables.shape[1]:
        return False
    end = min(first + starts.size, count)
    if end <= first:
        return True
    for b in range(first, end):
        if plan.tables[s, b] < 0 or plan.tables[s, b] >= pool.octets.shape[0]:
            return False
        starts[b - first] = plan.starts[s, b] if plan.starts.size else b * BLOCK_SIZE
    rows = scratch.peak.size
    absorb(geo, table, pool, plan.tables[s, first:end], starts, head, rows, scratch, view)
    return True


@kernel
def _attend_tail(
    geo: Any, table: Any, plan: Any, s: int, head: int, scratch: Any, view: Any
) -> bool:
    """The tokens that are not sealed. Returns False if there cannot be so many."""
    n, group = plan.q.shape[1], plan.q.shape[2] // geo.heads
    if plan.tails.shape[0] == 0 or plan.tail_counts[s] == 0:
        return True
    count = plan.tail_counts[s]
    if count < n or count > BLOCK_SIZE:
        return False
    read_tail(plan.tails[s], head, count, scratch)
    values = plan.tails[s, 1, :, head, :]
    for row in range(n * group):
        query = plan.q[s, row // group, head * group + row % group]
        seen = count - n + row // group + 1
        absorb_tail(query, values, seen, scratch, row, view, plan.positions[s] + n - count)
    return True


@kernel
def _merge_pair(
    geo: Any, table: Any, plan: Any, s: int, head: int, first: int, chunks: int, parts: Any,
    found: Any,
) -> None:  # fmt: skip
    """Merges items [first, first + chunks), the last one the tail, of every row."""
    mixed, peak, total = parts
    output, largest, log_sum = found
    group = output.shape[2] // geo.heads
    tail = first + chunks - 1
    for row in range(mixed.shape[1]):
        i, at = row // group, head * group + row % group
        sink = plan.sinks[at] * LOG2E if plan.sinks.size else _NEVER
        top = sink
        for item in range(first, tail + 1):
            top = max(top, peak[item, row])
        out = output[s, i, at]
        out[:] = _ZERO
        largest[s, i, at] = top * _LN2
        log_sum[s, i, at] = _ZERO
        if top == _NEVER:
            continue
        weight = _ZERO
        for item in range(first, tail + 1):
            if item == tail:  # which is in V's own space
                unrotate(geo, table, plan.centers[1, head], out, weight)
            if peak[item, row] == _NEVER:
                continue
            share = exp2(peak[item, row] - top)
            weight += share * total[item, row]
            for j in range(geo.dim):
                out[j] += share * mixed[item, row, j]
        if sink > _NEVER:
            weight += exp2(sink - top)
        for j in range(geo.dim):
            out[j] /= weight
        log_sum[s, i, at] = np.log(weight)
