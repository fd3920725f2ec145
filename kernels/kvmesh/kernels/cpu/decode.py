"""Decode attention over any sealed blocks and a tail, for merging with what others attended to.

Unlike step.py, which runs a model's layer over the whole of a sequence, this takes the blocks that
a process has and says with the output how much weight it stands for: (output, max, log-sum). The
blocks of a sequence are taken SPLIT_BLOCKS at a time, and the partial sums merged from first to
last, then the tail: so a result depends on the sequence alone, not on threads or company.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cpu.attend import (
    LOG2E,
    View,
    absorb,
    absorb_tail,
    read_tail,
    start_row,
    unrotate,
)
from kvmesh.kernels.cpu.decode_inputs import Cache, Masking, Queries, checked
from kvmesh.kernels.cpu.jit import entry
from kvmesh.kernels.cpu.lanes import exp2
from kvmesh.kernels.cpu.threads import run_parts
from kvmesh.kernels.cpu.tile import Pool, geometry, make_scratch, tables
from kvmesh.kernels.merge import Partial

SPLIT_BLOCKS = 64  # part of the result: another size adds up in another order
_NEVER = np.float32(-np.inf)
_ZERO = np.float32(0.0)
_LN2 = np.float32(np.log(2))

Floats = npt.NDArray[np.float32]


def attend_decode(
    cache: Cache, queries: Queries, masking: Masking | None = None, threads: int = 1
) -> Partial:
    """Attention of every query, scores scaled by 1/sqrt(D): fp32 output [S, n, Hq, D], max and
    log_sum [S, n, Hq]. A query that sees nothing has output 0, max -inf and log_sum 0.

    Raises ValueError naming the array that does not fit, before anything is computed.
    """
    masking = masking or Masking()
    plan = checked(cache, queries, masking)
    layout = cache.layout
    sequences, n, heads, dim = plan.q.shape
    rows = n * heads // layout.num_kv_heads
    items = _items(plan.counts, plan.tail_counts, layout.num_kv_heads)
    parts = _Parts(
        np.empty((len(items), rows, dim), np.float32),
        np.empty((len(items), rows), np.float32),
        np.empty((len(items), rows), np.float32),
    )
    pool = Pool(cache.blocks, cache.blocks.view(np.uint16), cache.blocks.view(np.float32))
    geo, table = geometry(layout, cache.layer), tables(layout, cache.layer)
    options = (np.float32(masking.soft_cap) * LOG2E, masking.window, masking.kept)

    def run(first: int, end: int) -> None:
        _run_items(
            geo, table, pool, plan.arrays, cache.centers, items[first:end], options,
            parts.slice(first, end),
        )  # fmt: skip

    run_parts(run, _parts_of(items, threads))
    found = Partial(
        np.empty(plan.q.shape, np.float32),
        np.empty((sequences, n, heads), np.float32),
        np.empty((sequences, n, heads), np.float32),
    )
    sinks = np.full(heads, _NEVER) if masking.sinks is None else masking.sinks
    _merge_items(
        geo, table, cache.centers, items, parts.arrays, sinks.astype(np.float32) * LOG2E,
        (found.output, found.max, found.log_sum),
    )  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class _Parts:
    """What each item found: the values' sum (rotated for blocks), largest score, sum of weights."""

    mixed: Floats
    peak: Floats
    total: Floats

    @property
    def arrays(self) -> Any:
        return self.mixed, self.peak, self.total

    def slice(self, first: int, end: int) -> Any:
        return self.mixed[first:end], self.peak[first:end], self.total[first:end]


def _items(
    counts: npt.NDArray[np.int64], tail_counts: npt.NDArray[np.int64], heads: int
) -> npt.NDArray[np.int64]:
    """int64 [any, 4]: sequence, kv head, first block, end; a tail has first = end = -1. A pair's
    items follow each other in the order in which they are merged."""
    rows: list[tuple[int, int, int, int]] = []
    for s, (count, tail) in enumerate(zip(counts.tolist(), tail_counts.tolist(), strict=True)):
        cuts = [
            (first, min(first + SPLIT_BLOCKS, count)) for first in range(0, count, SPLIT_BLOCKS)
        ]
        if tail or not cuts:  # an item for every pair, even one that sees nothing
            cuts.append((-1, -1))
        rows += [(s, head, first, end) for head in range(heads) for first, end in cuts]
    return np.array(rows, np.int64).reshape(-1, 4)


def _parts_of(items: npt.NDArray[np.int64], threads: int) -> list[tuple[int, int]]:
    """[first, end) of consecutive items, as much work in each as in the others."""
    work = np.cumsum(items[:, 3] - items[:, 2] + 1)
    wanted = work[-1] * np.arange(1, threads) / threads
    cuts = [0, *(np.searchsorted(work, wanted) + 1).tolist(), len(items)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


@entry
def _run_items(
    geo: Any, table: Any, pool: Any, plan: Any, centers: Any, items: Any, options: Any, parts: Any
) -> None:
    q, blocks, positions, starts, tails, tail_counts = plan
    cap, window, kept = options
    mixed, peak, total = parts
    n = q.shape[1]
    group = q.shape[2] // geo.heads
    scratch = make_scratch(geo.dim, n * group)
    for item in range(items.shape[0]):
        s, head, first, end = items[item]
        view = View(cap, np.int64(window), np.int64(kept), positions[s], np.int64(group))
        for i in range(n):
            for g in range(group):
                start_row(
                    geo, table, q[s, i, head * group + g], centers[0, head], scratch, i * group + g
                )
        if end > first:
            absorb(
                geo, table, pool, blocks[s, first:end], starts[s, first:end], head, n * group,
                scratch, view,
            )  # fmt: skip
        if first < 0 and tail_counts[s] > 0:
            count = tail_counts[s]
            read_tail(tails[s], head, count, scratch)
            values = tails[s, 1, :, head, :]
            begin = positions[s] + n - count
            for i in range(n):
                for g in range(group):
                    query = q[s, i, head * group + g]
                    seen = count - n + i + 1
                    absorb_tail(query, values, seen, scratch, i * group + g, view, begin)
        for row in range(n * group):
            peak[item, row] = scratch.peak[row]
            total[item, row] = scratch.total[row]
            mixed[item, row, :] = scratch.mixed[row]


@entry
def _merge_items(
    geo: Any, table: Any, centers: Any, items: Any, parts: Any, sinks: Any, found: Any
) -> None:
    mixed, peak, total = parts
    output, largest, log_sum = found
    group = output.shape[2] // geo.heads
    begin = 0
    while begin < items.shape[0]:
        s, head = items[begin, 0], items[begin, 1]
        end = begin
        while end < items.shape[0] and items[end, 0] == s and items[end, 1] == head:
            end += 1
        for row in range(mixed.shape[1]):
            i, at = row // group, head * group + row % group
            top = sinks[at]
            for item in range(begin, end):
                top = max(top, peak[item, row])
            out = output[s, i, at]
            out[:] = _ZERO
            largest[s, i, at] = top * _LN2
            log_sum[s, i, at] = _ZERO
            if top == _NEVER:
                continue
            weight = _ZERO
            for item in range(begin, end):
                if peak[item, row] == _NEVER:
                    continue
                share = exp2(peak[item, row] - top)
                if items[item, 2] < 0:  # the tail, last of all, is in V's own space
                    unrotate(geo, table, centers[1, head], out, weight)
                weight += share * total[item, row]
                for j in range(geo.dim):
                    out[j] += share * mixed[item, row, j]
            if items[end - 1, 2] >= 0 or peak[end - 1, row] == _NEVER:
                unrotate(geo, table, centers[1, head], out, weight)
            if sinks[at] > _NEVER:
                weight += exp2(sinks[at] - top)
            for j in range(geo.dim):
                out[j] /= weight
            log_sum[s, i, at] = np.log(weight)
        begin = end
