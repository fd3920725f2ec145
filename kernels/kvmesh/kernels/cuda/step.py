"""One step's attention on a CUDA device, layer by layer: what a backend calls.

The order within a layer is law 2: blocks that fill are sealed, every row attends to the sealed
blocks before its own and to its own block in full precision, then the tails keep what is new.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cuda.blocks import BlockTools
from kvmesh.kernels.cuda.device import Device
from kvmesh.kernels.cuda.occupancy import block_shape
from kvmesh.kernels.cuda.plan import DevicePlan, Grid, Splitting
from kvmesh.kernels.cuda.source import PREFILL_WARPS, ROWS, Unit, attend_shape, value_parts
from kvmesh.kernels.errors import CodecError
from kvmesh.kernels.layout import KvLayout


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores are made. scale: 0 means 1/sqrt(head_dim). cap: soft-cap of logits, 0 for none.

    window: a token sees itself and the window - 1 tokens before it; 0 for all. sinks: device fp32
    [query heads], a logit that takes part in the sum alone, or None.
    """

    scale: float = 0.0
    cap: float = 0.0
    window: int = 0
    sinks: Any = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Device memory of a pool. blocks uint8 [n, block_bytes]; tails fp32 [slots, layers, 2, 64,
    heads, dim]; centers fp32 [layers, 2, heads, dim]."""

    blocks: Any
    tails: Any
    centers: Any


class StepKernels:
    """The kernels of one layout on one device, with their scratch memory, which grows on demand."""

    def __init__(
        self, device: Device, layout: KvLayout, memory: Memory, splitting: Splitting | None = None
    ) -> None:
        self._device = device
        self._layout = layout
        self._memory = memory
        self._splitting = splitting or Splitting()
        self._tools = BlockTools(device, layout)
        self._scratch: dict[str, Any] = {}

    def run_layer(
        self, plan: DevicePlan, layer: int, qkv: tuple[Any, Any, Any], out: Any,
        rule: Rule | None = None, lse: Any = None,
    ) -> None:  # fmt: skip
        """q, out: device fp32 [T, Hq, D]; k, v: [T, Hkv, D]; lse: None or fp32 [T, Hq], written:
        natural logarithm of the sum of exp(score)."""
        self.seal(plan, layer, qkv[1:])
        self.attend(plan, layer, qkv, out, rule or Rule(), lse)
        self.append(plan, layer, qkv[1:])

    def seal(self, plan: DevicePlan, layer: int, kv: tuple[Any, Any]) -> None:
        """One layer of the blocks that the step fills."""
        if not plan.grid.filled:
            return
        layout = self._layout
        grid = (plan.grid.filled, layout.num_kv_heads, 2)
        args = (
            self._memory.blocks, *self._offsets(layer), plan.row_start, plan.start, plan.slot,
            plan.tables, np.int32(plan.grid.table_width), *kv, self._memory.tails,
            np.int32(layer), np.int32(layout.num_layers), np.int32(layout.num_kv_heads),
            self._memory.centers[layer], plan.filled, plan.num_filled, plan.bad,
        )  # fmt: skip
        self._launch(self._unit("seal", layer), "seal_layer", grid, args)

    def append(self, plan: DevicePlan, layer: int, kv: tuple[Any, Any]) -> None:
        """The rows of each segment's unfinished block, to its tail."""
        layout = self._layout
        args = (
            self._memory.tails, plan.row_start, plan.start, plan.slot, plan.token_segment,
            plan.num_tokens, *kv, np.int32(layer), np.int32(layout.num_layers),
            np.int32(layout.num_kv_heads),
        )  # fmt: skip
        self._launch(self._unit("seal", layer), "append_tails", (plan.grid.tokens, 1, 1), args)

    def finish(self, plan: DevicePlan) -> None:
        """Header and checksum of the filled blocks, after every layer.

        Waits for the device. Raises CodecError if K or V of one held a NaN or an infinity; such a
        block has no header, the others are complete.
        """
        if plan.host is None or not plan.grid.filled:
            return
        self._tools.finish(self._memory.blocks, plan)
        bad = np.flatnonzero(self._device.get(plan.bad))
        if len(bad):
            segment = int(plan.host.filled[bad[0], 0])
            raise CodecError(f"K or V of segment {segment} holds a NaN or an infinity")

    def attend(
        self, plan: DevicePlan, layer: int, qkv: tuple[Any, Any, Any], out: Any, rule: Rule,
        lse: Any = None,
    ) -> None:  # fmt: skip
        query_heads = int(qkv[0].shape[1])
        group = query_heads // self._layout.num_kv_heads
        peaks, outs = self._parts(plan.grid, query_heads)
        rest = (plan.token_part, peaks, outs)
        for tiles, count, prefill in (
            (plan.decode, plan.num_decode, False),
            (plan.prefill, plan.num_prefill, True),
        ):
            if len(tiles):
                self._attend_tiles(
                    plan, layer, (tiles, count, prefill), (qkv[0], group), rule, rest
                )
        self._finish_rows(plan, layer, qkv, (out, lse), rule, rest)

    def _attend_tiles(
        self, plan: DevicePlan, layer: int, tiles: tuple[Any, Any, bool], query: tuple[Any, int],
        rule: Rule, parts: tuple[Any, Any, Any],
    ) -> None:  # fmt: skip
        layout, unit = self._layout, self._unit("attend", layer)
        shape, heads = attend_shape(unit), layout.num_kv_heads
        at, count, prefill = tiles
        q, group = query
        number = len(at)
        words, meta = self._queries(number, shape.query_words)
        args = (
            plan.row_start, plan.start, at, count, np.int32(group), np.int32(heads), q,
            self._memory.centers[layer], np.float32(self._scale(rule)), words, meta,
        )  # fmt: skip
        self._launch(unit, "prepare_queries", (number, heads, 1), args)
        limits = self._splitting
        args = (
            self._memory.blocks, *self._offsets(layer), plan.row_start, plan.start, plan.tables,
            np.int32(plan.grid.table_width), at, count, np.int32(group), np.int32(heads), words,
            meta, np.float32(rule.cap), np.int32(rule.window), np.int32(limits.most),
            np.int32(limits.least), *parts,
        )  # fmt: skip
        wide = heads * value_parts(layout.head_dim)
        if prefill:
            self._launch(unit, "attend_prefill", (number // PREFILL_WARPS, wide, 1), args)
        else:
            depth = -(-limits.most // shape.decode_warps)
            self._launch(unit, "attend_decode", (number, wide, depth), args)

    def _finish_rows(
        self, plan: DevicePlan, layer: int, qkv: tuple[Any, Any, Any], outs: tuple[Any, Any],
        rule: Rule, parts: tuple[Any, Any, Any],
    ) -> None:  # fmt: skip
        layout, limits = self._layout, self._splitting
        tokens, query_heads = plan.grid.tokens, int(qkv[0].shape[1])
        args = (
            plan.row_start, plan.start, plan.slot, plan.tables,
            np.int32(plan.grid.table_width), plan.token_segment, plan.num_tokens, *qkv,
            self._memory.tails, np.int32(layer), np.int32(layout.num_layers),
            np.int32(query_heads // layout.num_kv_heads), np.int32(layout.num_kv_heads),
            self._memory.centers[layer], np.float32(self._scale(rule)), np.float32(rule.cap),
            np.int32(rule.window), np.int32(limits.most), np.int32(limits.least), rule.sinks,
            *parts, *outs,
        )  # fmt: skip
        grid = (tokens, query_heads, 1)
        self._launch(self._unit("attend", layer), "finish_rows", grid, args)

    def _launch(
        self, unit: Unit, kernel: str, grid: tuple[int, int, int], args: tuple[Any, ...]
    ) -> None:
        self._device.launch(unit, kernel, grid, *block_shape(unit, kernel), args)

    def _scale(self, rule: Rule) -> float:
        return rule.scale or self._layout.head_dim**-0.5

    def _unit(self, name: Any, layer: int) -> Unit:
        codec = self._layout.planes(layer).codec
        return Unit(name, self._layout.head_dim, codec.key_bits, codec.value_bits)

    def _offsets(self, layer: int) -> tuple[np.int64, ...]:
        at = self._layout.planes(layer)
        starts = (at.key_codes, at.value_codes, at.key_scales, at.value_scales)
        return tuple(np.int64(value) for value in (self._layout.block_bytes, *starts))

    def reserve(self, grid: Grid, query_heads: int) -> None:
        """Scratch memory for any step within `grid`, so that captured addresses stay."""
        for layer in range(self._layout.num_layers):
            words = attend_shape(self._unit("attend", layer)).query_words
            self._queries(max(grid.decode, grid.prefill), words)
        self._parts(grid, query_heads)

    def _queries(self, tiles: int, words: int) -> tuple[Any, Any]:
        number = tiles * self._layout.num_kv_heads
        queries = self._array("queries", number * words, np.uint32)
        return queries, self._array("meta", number * ROWS * 4, np.float32)

    def _parts(self, grid: Grid, query_heads: int) -> tuple[Any, Any]:
        number = grid.num_parts * query_heads
        halves = value_parts(self._layout.head_dim)
        peaks = self._array("peaks", number * halves * 2, np.float32)
        return peaks, self._array("outs", number * self._layout.head_dim, np.float32)

    def _array(self, name: str, size: int, dtype: npt.DTypeLike) -> Any:
        held = self._scratch.get(name)
        if held is None or held.size < size:
            held = self._scratch[name] = self._device.zeros((size,), dtype)
        return held
