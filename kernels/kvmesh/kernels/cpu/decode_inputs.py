"""What decode attention is asked, checked before anything is computed."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cpu.jit import kernel
from kvmesh.kernels.cpu.tile import constants
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

MAX_QUERIES, MAX_GROUP = 8, 16

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Cache:
    """One layer's keys and values.

    blocks: uint8 [num_blocks, layout.block_bytes], sealed. centers: fp32 [2 (K, V), Hkv, D].
    Worth keeping from call to call: what kernels need to know of the layer is looked up but once.
    """

    layout: KvLayout
    layer: int
    blocks: npt.NDArray[np.uint8]
    centers: Floats
    constants: tuple[tuple[int, ...], tuple[Any, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "constants", constants(self.layout, self.layer))


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


class Plan(NamedTuple):
    """What kernels read of a call. Contiguous, of the types that they are compiled for; empty where
    None was given."""

    q: Any
    tables: Any  # int32
    counts: Any  # int64, as all that follow but tails
    positions: Any
    starts: Any
    tails: Any
    tail_counts: Any
    centers: Any
    sinks: Any


_REAL, _SHORT, _LONG = (np.dtype(x) for x in (np.float32, np.int32, np.int64))
_NO_TABLE, _NO_COUNTS = np.zeros((0, 0), np.int64), np.zeros(0, np.int64)
_NO_TAILS, _NO_SINKS = np.zeros((0,) * 5, np.float32), np.zeros(0, np.float32)


def _as(array: npt.NDArray[Any], dtype: "np.dtype[Any]") -> npt.NDArray[Any]:
    """The array itself if it will do: a call of NumPy costs more than it seems, see decode.py."""
    if array.dtype == dtype and array.flags.carray:
        return array
    return np.require(array, dtype, ["C", "A", "W"])


@kernel
def plan_of(arrays: Any) -> Any:
    q, tables, counts, positions, starts, tails, tail_counts, centers, sinks = arrays
    return Plan(q, tables, counts, positions, starts, tails, tail_counts, centers, sinks)


def checked(cache: Cache, queries: Queries, masking: Masking) -> tuple[Any, ...]:
    """The arrays of a Plan. Looks at shapes alone; what is in the arrays is checked where it is
    used."""
    layout, q = cache.layout, queries.q
    heads, dim = layout.num_kv_heads, layout.head_dim
    if q.ndim != 4 or not 1 <= q.shape[1] <= MAX_QUERIES or q.shape[0] < 1:
        raise ValueError(f"q has shape {q.shape}, must be [S, 1..{MAX_QUERIES}, Hq, {dim}]")
    if q.shape[2] % heads or not 1 <= q.shape[2] // heads <= MAX_GROUP:
        raise ValueError(f"q has {q.shape[2]} heads, must be 1..{MAX_GROUP} times {heads}")
    if q.shape[3] != dim:
        raise ValueError(f"q has shape {q.shape}, its vectors must have {dim} elements")
    sequences, width = q.shape[0], queries.tables.shape[-1]
    one, tails, starts, sinks = (sequences,), queries.tails, queries.starts, masking.sinks
    counts = queries.tail_counts
    for name, array, expected in (
        ("centers", cache.centers, (2, heads, dim)),
        ("tables", queries.tables, (sequences, width)),
        ("counts", queries.counts, one),
        ("positions", queries.positions, one),
        ("starts", starts, (sequences, width)),
        ("tails", tails, (sequences, 2, BLOCK_SIZE, heads, dim)),
        ("tail_counts", counts, one),
        ("sinks", sinks, (q.shape[2],)),
    ):
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
    block_bytes = cache.constants[0][-1]
    if cache.blocks.ndim != 2 or cache.blocks.shape[1] != block_bytes:
        raise ValueError(f"blocks has shape {cache.blocks.shape}, expected [any, {block_bytes}]")
    if tails is not None and counts is None:
        raise ValueError("tails were given and no tail_counts")
    if masking.soft_cap < 0 or masking.window < 0 or masking.kept < 0:
        raise ValueError(f"{masking} has a negative number, 0 turns an option off")
    return (
        _as(q, _REAL),
        _as(queries.tables, _SHORT),
        _as(queries.counts, _LONG),
        _as(queries.positions, _LONG),
        _NO_TABLE if starts is None else _as(starts, _LONG),
        _NO_TAILS if tails is None else _as(tails, _REAL),
        _NO_COUNTS if counts is None else _as(counts, _LONG),
        _as(cache.centers, _REAL),
        _NO_SINKS if sinks is None else _as(sinks, _REAL),
    )


def check_ranges(cache: Cache, queries: Queries, n: int) -> None:
    """Raises ValueError naming what the kernel found to reach outside of its array."""
    counts, width = queries.counts, queries.tables.shape[1]
    if counts.min() < 0 or counts.max() > width:
        raise ValueError(f"counts are {counts.min()}..{counts.max()}, tables hold {width}")
    used = queries.tables[np.arange(width) < counts[:, None]]
    if used.size and (used.min() < 0 or used.max() >= len(cache.blocks)):
        raise ValueError(
            f"tables name block {used.min() if used.min() < 0 else used.max()}, "
            f"must be in [0, {len(cache.blocks)})"
        )
    tails = _NO_COUNTS if queries.tail_counts is None else queries.tail_counts
    wrong = tails[(tails != 0) & ((tails < n) | (tails > BLOCK_SIZE))]
    raise ValueError(f"a tail has {wrong[0]} tokens, must be 0 or {n}..{BLOCK_SIZE}")
