"""One step's attention on the CPU: what a backend calls, layer by layer.

Law 2 lives here: a token attends to the blocks before its own in sealed form, and to its own block
in full precision, however the prompt was cut and whatever else is in the step.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kernels import block as block_bytes
from kvmesh.kernels.cpu.attend import attend
from kvmesh.kernels.cpu.jit import cycles, entry
from kvmesh.kernels.cpu.seal import seal_layer
from kvmesh.kernels.cpu.threads import run_parts, run_shared, split
from kvmesh.kernels.cpu.tile import constants, make_scratch, named, pool_of
from kvmesh.kernels.cpu.vectors import take_one
from kvmesh.kernels.errors import CodecError
from kvmesh.kernels.layout import BLOCK_SIZE, CODECS, KvLayout

_HEADS = 4  # that are sealed at once: enough for threads to share a few blocks

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which rows of a step belong to which sequence. S segments; each is consecutive tokens.

    row_start: int32 [S + 1], rows of segment i are [row_start[i], row_start[i + 1]).
    pos: int64 [S], the position of a segment's first token in its sequence.
    slot: int32 [S], where the sequence's tail lives; no two segments share one.
    tables: int32 [S, max_blocks], pool ids by block number, at least as far as the segment reaches.
    """

    row_start: npt.NDArray[np.int32]
    pos: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int32]
    tables: npt.NDArray[np.int32]


@entry
def _misfit(row_start: Any, pos: Any, slot: Any, blocks: Any, rows: int, limits: Any) -> int:
    """The first segment that would reach outside its arrays, or -1."""
    slots, num_blocks = limits
    for s in range(pos.size):
        count = row_start[s + 1] - row_start[s]
        if row_start[s] < 0 or count < 0 or row_start[s + 1] > rows or pos[s] < 0:
            return s
        if slot[s] < 0 or slot[s] >= slots:
            return s
        full = (pos[s] + count) // BLOCK_SIZE
        if full > blocks.shape[1]:
            return s
        for b in range(full):
            if blocks[s, b] < 0 or blocks[s, b] >= num_blocks:
                return s
    return -1


@entry
def _run(
    layer_constants: Any, octets: Any, tails: Any, plan: Any, qkv: Any, centers: Any, out: Any,
    part: Any,
) -> Any:  # fmt: skip
    """Runs every segment on some KV heads. part: (layer, first head, end).

    Returns (the first segment whose K or V could not be sealed, or -1; cycles that sealing took;
    cycles in all).
    """
    geo, table = named(layer_constants)
    pool = pool_of(octets)
    row_start, pos, slot, blocks = plan
    q, k, v = qkv
    layer, head, last = part
    began = cycles()
    sealing = began - began
    most = 0
    for s in range(pos.size):
        most = max(most, row_start[s + 1] - row_start[s])
    scratch = make_scratch(geo.dim, min(most, BLOCK_SIZE) * (q.shape[1] // geo.heads))
    failed = -1
    for s in range(pos.size):
        tail = tails[slot[s], layer]
        row = np.int64(row_start[s])
        at = pos[s]
        while row < row_start[s + 1]:
            first = at % BLOCK_SIZE
            before = at // BLOCK_SIZE
            count = min(BLOCK_SIZE - first, row_start[s + 1] - row)
            end = row + count
            tail[0, first : first + count, head:last] = k[row:end, head:last]
            tail[1, first : first + count, head:last] = v[row:end, head:last]
            attend(
                geo, table, pool, blocks[s, :before], tail, centers, q[row:end], first, scratch,
                out[row:end], (head, last),
            )  # fmt: skip
            if first + count == BLOCK_SIZE:
                filled = cycles()
                block = blocks[s, before]
                if not seal_layer(geo, table, pool, block, tail, centers, (head, last)):
                    failed = s if failed < 0 else failed
                sealing += cycles() - filled
            row = end
            at += count
    return failed, sealing, cycles() - began


def run_layer(
    layout: KvLayout,
    pool: npt.NDArray[np.uint8],
    tails: Floats,
    plan: StepPlan,
    layer: int,
    qkv: tuple[Floats, Floats, Floats],
    centers: Floats,
    out: Floats,
    threads: int = 1,
) -> float:
    """Attention of one layer over every token of a step; seals the blocks that fill.

    pool: uint8 [num_blocks, layout.block_bytes], changed in place.
    tails: fp32 [num_slots, num_layers, 2, 64, Hkv, D], changed in place.
    qkv: fp32 q [T, Hq, D], k and v [T, Hkv, D], q and k after RoPE.
    centers: fp32 [num_layers, 2, Hkv, D], the model's mean K and V; float codecs ignore them.
    out: fp32 [T, Hq, D], written; scores are scaled by 1/sqrt(D).
    threads: share the KV heads between them; no bit depends on it.

    Returns the share of the time, 0 to 1, that sealing took.

    Raises ValueError for arrays that do not fit together, before anything is written, and
    CodecError if a block filled that holds a NaN or an infinity; other segments are then complete.
    """
    q, k, v = (np.require(x, np.float32, ["C", "W"]) for x in qkv)
    _check_shapes(layout, pool, tails, (q, k, v), centers, out)
    arrays = (plan.row_start, plan.pos, plan.slot, plan.tables)
    misfit = _misfit(*arrays, len(q), (len(tails), len(pool)))
    if misfit >= 0:
        raise ValueError(f"segment {misfit} reaches outside the rows, slots or blocks of the step")
    known = constants(layout, layer)

    def run(head: int, last: int) -> tuple[int, int, int]:
        found: tuple[int, int, int] = _run(
            known, pool, tails, arrays, (q, k, v), centers[layer], out, (layer, head, last)
        )
        return found

    results = run_parts(run, split(layout.num_kv_heads, threads))
    failed = [segment for segment, _, _ in results if segment >= 0]
    if failed:
        raise CodecError(
            f"K or V of segment {min(failed)}, layer {layer} holds a NaN or an infinity"
        )
    total = sum(whole for _, _, whole in results)
    return sum(sealing for _, sealing, _ in results) / total if total else 0.0


def _check_shapes(
    layout: KvLayout,
    pool: npt.NDArray[np.uint8],
    tails: Floats,
    qkv: tuple[Floats, Floats, Floats],
    centers: Floats,
    out: Floats,
) -> None:
    q, k, v = qkv
    heads, dim = layout.num_kv_heads, layout.head_dim
    if q.ndim != 3 or q.shape[1] == 0 or q.shape[1] % heads:
        raise ValueError(f"q has shape {q.shape}, heads must be a multiple of {heads}")
    for name, found, expected in (
        ("q", q.shape[2], dim),
        ("k", k.shape, (len(q), heads, dim)),
        ("v", v.shape, (len(q), heads, dim)),
    ):
        if found != expected:
            raise ValueError(f"{name} has shape {found}, expected {expected}")
    layers = layout.num_layers
    for name, array, dtype, shape in (
        ("pool", pool, np.uint8, (len(pool), layout.block_bytes)),
        ("tails", tails, np.float32, (len(tails), layers, 2, BLOCK_SIZE, heads, dim)),
        ("centers", centers, np.float32, (layers, 2, heads, dim)),
        ("out", out, np.float32, q.shape),
    ):
        _check_fit(name, array, dtype, shape)


def _check_fit(
    name: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if array.dtype != dtype or not (array.flags.c_contiguous and array.flags.writeable):
        raise ValueError(f"{name} must be {dtype.__name__}, C-contiguous and writable")


@entry
def _seal_items(
    geos: Any, shared: Any, blocks: Any, block_ids: Any, tails: Any, centers: Any, counters: Any,
    failed: Any,
) -> None:  # fmt: skip
    """Takes items until there are none: some heads of a layer of a block, block by block.

    geos: int64 [layers, 9], a Geometry each; shared: a Tables, as a plain tuple; counters: int64
    [1 + blocks], the next item, then how many of each block are done; failed: bool
    [blocks, layers], set where something is not finite.
    """
    layers = geos.shape[0]
    heads = geos[0, 0]
    parts = -(-heads // _HEADS)
    pool = pool_of(blocks)
    counts = counters.ctypes.data
    while True:
        item = take_one(counts, 0)
        number, layer, part = item // (layers * parts), item // parts % layers, item % parts
        if number >= block_ids.size:
            break
        geo, table = named((geos[layer], shared))
        some = part * _HEADS, min(part * _HEADS + _HEADS, heads)
        tail = tails[number, layer]
        if not seal_layer(geo, table, pool, block_ids[number], tail, centers[layer], some):
            failed[number, layer] = True
        take_one(counts, 1 + number)


def seal_blocks(
    layout: KvLayout,
    pool: npt.NDArray[np.uint8],
    block_ids: npt.NDArray[np.int64],
    tails: Floats,
    centers: Floats,
    threads: int = 1,
) -> None:
    """Seals full tails, fp32 [blocks, num_layers, 2, 64, Hkv, D], to rows `block_ids` of the pool,
    with header and checksum. Threads take heads and blocks from one list. See `run_layer`.

    Raises ValueError for arrays that do not fit together, before anything is written, and
    CodecError if a tail holds a NaN or an infinity; blocks of other tails are then complete.
    """
    heads, dim, layers = layout.num_kv_heads, layout.head_dim, layout.num_layers
    _check_fit("pool", pool, np.uint8, (len(pool), layout.block_bytes))
    _check_fit("tails", tails, np.float32, (len(block_ids), layers, 2, BLOCK_SIZE, heads, dim))
    _check_fit("centers", centers, np.float32, (layers, 2, heads, dim))
    if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < len(pool):
        raise ValueError(f"block ids are {block_ids.tolist()}, the pool has {len(pool)} blocks")
    geos = np.array([constants(layout, layer)[0] for layer in range(layers)], np.int64)
    shared = constants(layout, 0)[1]  # of which sealing needs what all layers share
    counters = np.zeros(1 + len(block_ids), np.int64)
    failed = np.zeros((len(block_ids), layers), np.bool_)
    whole = layers * -(-heads // _HEADS)
    waiting = dict.fromkeys(range(len(block_ids)), True)

    def run() -> None:
        """Then writes the checksums of blocks that are sealed: whoever seals the last part of one
        comes here later, so none is left over."""
        _seal_items(geos, shared, pool, block_ids, tails, centers, counters, failed)
        for number, block_id in enumerate(block_ids.tolist()):
            sealed = counters[1 + number] == whole and not failed[number].any()
            if sealed and waiting.pop(number, False):
                finish_blocks(layout, pool, block_id)

    run_shared(run, min(threads, max(1, whole * len(block_ids))))
    if failed.any():
        number, layer = divmod(int(failed.argmax()), layers)
        raise CodecError(f"tail {number}, layer {layer} holds a NaN or an infinity")


def finish_blocks(layout: KvLayout, pool: npt.NDArray[np.uint8], block_ids: npt.ArrayLike) -> None:
    """Writes header and checksum of blocks whose layers are all sealed. block_ids: int [any]."""
    for block_id in np.atleast_1d(np.asarray(block_ids, np.int64)).tolist():
        block_bytes.finish(layout, pool[block_id])


def warm() -> None:
    """Compiles every kernel that serving uses, or loads it from the cache, by a tiny step of every
    codec."""
    for codec in CODECS:
        layout = KvLayout(1, 1, 32, codec, bytes(16))
        tails = np.zeros((1, 1, 2, BLOCK_SIZE, 1, 32), np.float32)
        pool = np.zeros((1, layout.block_bytes), np.uint8)
        plan = StepPlan(
            np.array([0, BLOCK_SIZE + 1], np.int32),
            np.zeros(1, np.int64),
            np.zeros(1, np.int32),
            np.zeros((1, 2), np.int32),
        )
        x = np.ones((BLOCK_SIZE + 1, 1, 32), np.float32)
        centers = np.zeros((1, 2, 1, 32), np.float32)
        run_layer(layout, pool, tails, plan, 0, (x, x.copy(), x.copy()), centers, np.empty_like(x))
