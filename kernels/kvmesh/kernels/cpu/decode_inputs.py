"""What decode attention is asked, checked before anything is computed."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

MAX_QUERIES, MAX_GROUP = 8, 16

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Cache:
    """One layer's keys and values.

    blocks: uint8 [num_blocks, layout.block_bytes], sealed. centers: fp32 [2 (K, V), Hkv, D].
    """

    layout: KvLayout
    layer: int
    blocks: npt.NDArray[np.uint8]
    centers: Floats


@dataclass(frozen=True, slots=True)
class Queries:
    """The last n tokens of each of S sequences, n <= 8, and what they attend to.

    q: fp32 [S, n, Hq, D], after RoPE; Hq a multiple of Hkv, at most 16 times.
    tables: int [S, W], rows of Cache.blocks. counts: int [S], how many of them are attended to.
    positions: int [S], of each sequence's first query.
    tails: fp32 [S, 2 (K, V), 64, Hkv, D] with tail_counts int [S] tokens, the queries' own the last
    n of them (a query does not see those after it); None: only sealed blocks.
    starts: int [S, W], the position of each block's first token; None: they follow each other
    from 0.
    """

    q: Floats
    tables: Integers
    counts: Integers
    positions: Integers
    tails: Floats | None = None
    tail_counts: Integers | None = None
    starts: Integers | None = None


@dataclass(frozen=True, slots=True)
class Masking:
    """soft_cap: scores become soft_cap * tanh(score / soft_cap). window: a query sees so many
    tokens, itself included, and the first `kept` of the sequence. sinks: fp32 [Hq], a score of
    each head that takes weight and gives no value; give them to one of the calls that are merged.
    Zero or None turns each off.
    """

    soft_cap: float = 0.0
    window: int = 0
    kept: int = 0
    sinks: Floats | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Plan:
    """Contiguous, of the types that the kernels are compiled for; None replaced."""

    q: Floats
    tables: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    tails: Floats
    tail_counts: npt.NDArray[np.int64]

    @property
    def arrays(self) -> Any:
        return self.q, self.tables, self.positions, self.starts, self.tails, self.tail_counts


def checked(cache: Cache, queries: Queries, masking: Masking) -> Plan:
    layout, q = cache.layout, queries.q
    heads, dim = layout.num_kv_heads, layout.head_dim
    if q.ndim != 4 or not 1 <= q.shape[1] <= MAX_QUERIES or q.shape[0] < 1:
        raise ValueError(f"q has shape {q.shape}, must be [S, 1..{MAX_QUERIES}, Hq, {dim}]")
    sequences, n = q.shape[:2]
    if q.shape[2] % heads or not 1 <= q.shape[2] // heads <= MAX_GROUP:
        raise ValueError(f"q has {q.shape[2]} heads, must be 1..{MAX_GROUP} times {heads}")
    width = queries.tables.shape[-1]
    none = np.zeros((sequences, 2, BLOCK_SIZE, heads, dim), np.float32)
    tails = none if queries.tails is None else queries.tails
    given = queries.tail_counts
    tail_counts = np.zeros(sequences, np.int64) if given is None else given.astype(np.int64)
    starts: Integers
    if queries.starts is None:
        starts = np.broadcast_to(np.arange(width) * BLOCK_SIZE, (sequences, width))
    else:
        starts = queries.starts
    sinks = masking.sinks
    for name, found, expected in (
        ("q", q.shape[3], dim),
        ("blocks", cache.blocks.shape[1:], (layout.block_bytes,)),
        ("centers", cache.centers.shape, (2, heads, dim)),
        ("tables", queries.tables.shape, (sequences, width)),
        ("counts", queries.counts.shape, (sequences,)),
        ("positions", queries.positions.shape, (sequences,)),
        ("starts", starts.shape, (sequences, width)),
        ("tails", tails.shape, none.shape),
        ("tail_counts", tail_counts.shape, (sequences,)),
        ("sinks", q.shape[2:3] if sinks is None else sinks.shape, q.shape[2:3]),
    ):
        if found != expected:
            raise ValueError(f"{name} has shape {found}, expected {expected}")
    _check_ranges(cache, queries, tail_counts, width, n)
    if masking.soft_cap < 0 or masking.window < 0 or masking.kept < 0:
        raise ValueError(f"{masking} has a negative number, 0 turns an option off")
    return Plan(
        np.ascontiguousarray(q, np.float32),
        np.ascontiguousarray(queries.tables, np.int32),
        queries.counts.astype(np.int64),
        queries.positions.astype(np.int64),
        np.ascontiguousarray(starts, np.int64),
        np.ascontiguousarray(tails, np.float32),
        tail_counts,
    )


def _check_ranges(
    cache: Cache, queries: Queries, tail_counts: Integers, width: int, n: int
) -> None:
    counts = queries.counts
    if counts.min() < 0 or counts.max() > width:
        raise ValueError(f"counts are {counts.min()}..{counts.max()}, tables hold {width}")
    used = queries.tables[np.arange(width) < counts[:, None]]
    if used.size and (used.min() < 0 or used.max() >= len(cache.blocks)):
        raise ValueError(
            f"tables name block {used.min() if used.min() < 0 else used.max()}, "
            f"must be in [0, {len(cache.blocks)})"
        )
    wrong = tail_counts[(tail_counts != 0) & ((tail_counts < n) | (tail_counts > BLOCK_SIZE))]
    if wrong.size:
        raise ValueError(f"a tail has {wrong[0]} tokens, must be 0 or {n}..{BLOCK_SIZE}")
