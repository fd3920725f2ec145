"""A step on a shim device beside the same step in NumPy."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_shim import ShimDevice

from kvmesh.kernels import block, reference
from kvmesh.kernels.cuda.graphs import DecodeGraphs
from kvmesh.kernels.cuda.plan import HostPlan, Splitting, plan_step, upload
from kvmesh.kernels.cuda.step import Memory, Rule, StepKernels
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout


@dataclass
class Case:
    """Sequences of `before` tokens that get `new` more, with random K, V, q and block tables."""

    codec: str
    dim: int
    heads: int = 2
    group: int = 2
    before: tuple[int, ...] = (0, 130)
    new: tuple[int, ...] = (70, 3)
    seed: int = 0
    layout: KvLayout = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.layout = KvLayout(1, self.heads, self.dim, self.codec, bytes(16))
        ends = [a + b for a, b in zip(self.before, self.new, strict=True)]
        shape = (self.heads, self.dim)
        self.keys = [rng.standard_normal((n, *shape)).astype(np.float32) + 1 for n in ends]
        self.values = [rng.standard_normal((n, *shape)).astype(np.float32) * 2 for n in ends]
        self.centers = rng.standard_normal((1, 2, *shape)).astype(np.float32)
        self.row_start = np.array([0, *np.cumsum(self.new)], np.int32)
        queries = (int(self.row_start[-1]), self.heads * self.group, self.dim)
        self.q = rng.standard_normal(queries).astype(np.float32)
        needed = [n // BLOCK_SIZE + 1 for n in ends]
        ids = iter(rng.permutation(sum(needed)).tolist())
        self.tables = np.zeros((len(ends), max(needed)), np.int32)
        for row, count in zip(self.tables, needed, strict=True):
            row[:count] = [next(ids) for _ in range(count)]
        self.num_blocks = sum(needed)

    def sealed(self, sequence: int, number: int) -> npt.NDArray[np.uint8]:
        """The block by the reference."""
        data = np.zeros(self.layout.block_bytes, np.uint8)
        at = slice(number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE)
        kv = self.keys[sequence][at], self.values[sequence][at]
        reference.seal_layer(self.layout, data, 0, kv, self.centers[0])
        block.finish(self.layout, data)
        return data

    def memory(self, device: Any) -> Memory:
        """A pool as the step finds it."""
        blocks = np.zeros((self.num_blocks, self.layout.block_bytes), np.uint8)
        tails = np.zeros((len(self.new), 1, 2, BLOCK_SIZE, self.heads, self.dim), np.float32)
        for sequence, count in enumerate(self.before):
            for number in range(count // BLOCK_SIZE):
                blocks[self.tables[sequence, number]] = self.sealed(sequence, number)
            first = count // BLOCK_SIZE * BLOCK_SIZE
            for kind, x in enumerate((self.keys[sequence], self.values[sequence])):
                tails[sequence, 0, kind, : count - first] = x[first:count]
        return Memory(device.put(blocks), device.put(tails), device.put(self.centers))

    def rows(self, x: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate([each[n:] for each, n in zip(x, self.before, strict=True)])

    def run(
        self, rule: Rule | None = None, splitting: Splitting | None = None, device: Any = None
    ) -> "Result":
        device = device or ShimDevice()
        splitting = splitting or Splitting()
        memory = self.memory(device)
        slots = np.arange(len(self.new), dtype=np.int32)
        start = np.array(self.before, np.int64)
        plan = plan_step(self.row_start, start, slots, self.tables, self.group, splitting)
        qkv = tuple(device.put(x) for x in (self.q, self.rows(self.keys), self.rows(self.values)))
        out = device.zeros(self.q.shape, np.float32)
        lse = device.zeros(self.q.shape[:2], np.float32)
        kernels = StepKernels(device, self.layout, memory, splitting)
        uploaded = upload(device, plan)
        kernels.run_layer(uploaded, 0, qkv, out, rule, lse)
        kernels.finish(uploaded)
        return Result(*(device.get(x) for x in (out, lse, memory.blocks, memory.tails)))

    def expected(self, rule: Rule) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(out, lse) in fp64 over the decoded blocks and the exact tail."""
        outs, sums = [], []
        for sequence, (before, count) in enumerate(zip(self.before, self.new, strict=True)):
            decoded = [
                reference.decode_layer(
                    self.layout, self.sealed(sequence, number), 0, self.centers[0]
                )
                for number in range((before + count) // BLOCK_SIZE)
            ]
            exact = self.keys[sequence], self.values[sequence]
            for i in range(count):
                position = before + i
                own = position // BLOCK_SIZE
                keys, values = (
                    np.concatenate([
                        *(each[kind] for each in decoded[:own]),
                        exact[kind][own * BLOCK_SIZE : position + 1].astype(np.float64),
                    ])
                    for kind in range(2)
                )  # fmt: skip
                out, lse = attend(self.q[self.row_start[sequence] + i], keys, values, rule)
                outs.append(out)
                sums.append(lse)
        return np.array(outs), np.array(sums)


@dataclass
class Result:
    out: npt.NDArray[np.float32]
    lse: npt.NDArray[np.float32]
    blocks: npt.NDArray[np.uint8]
    tails: npt.NDArray[np.float32]


def attend(
    q: npt.NDArray[np.float32], keys: npt.NDArray[np.float64], values: npt.NDArray[np.float64],
    rule: Rule,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:  # fmt: skip
    """One token's attention by the definition: fp64 [Hq, D] and ln of the sum [Hq]."""
    group = len(q) // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = np.einsum("hd,thd->ht", q.astype(np.float64), keys)
    scores *= rule.scale or q.shape[1] ** -0.5
    if rule.cap:
        scores = rule.cap * np.tanh(scores / rule.cap)
    if rule.window:
        scores[:, : max(0, scores.shape[1] - rule.window)] = -np.inf
    if rule.sinks is not None:
        scores = np.concatenate((scores, np.asarray(rule.sinks, np.float64)[:, None]), axis=1)
        values = np.concatenate((values, np.zeros((1, *values.shape[1:]))))
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    out: npt.NDArray[np.float64] = np.einsum("ht,thd->hd", weights / total, values)
    return out, (top + np.log(total))[:, 0]


def worst_error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The largest error of a head's output, relative to the output."""
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(errors.max())


SPLITTING = Splitting(3, 1)


def decode_case() -> Case:
    """Four sequences that get one token each and fill no block."""
    return Case("k4v4", 64, 1, 4, before=(200, 75, 10, 131), new=(1, 1, 1, 1), seed=3)


class DecodeSteps:
    """Decode steps of some of a case's sequences, on buffers that stay."""

    def __init__(self, device: Any, case: Case) -> None:
        self.device, self.case = device, case
        self.memory = case.memory(device)
        self.qkv = tuple(
            device.zeros((8, *shape[1:]), np.float32)
            for shape in (case.q.shape, case.rows(case.keys).shape, case.rows(case.values).shape)
        )
        self.out = device.zeros((8, *case.q.shape[1:]), np.float32)

    def kernels(self) -> StepKernels:
        return StepKernels(self.device, self.case.layout, self.memory, SPLITTING)

    def load(self, chosen: list[int]) -> HostPlan:
        case = self.case
        arrays = (case.q, case.rows(case.keys), case.rows(case.values))
        for target, source in zip(self.qkv, arrays, strict=True):
            self.device.write(target[: len(chosen)], source[chosen])
        width = 1 + max(case.before[each] // 64 for each in chosen)
        return plan_step(
            np.arange(len(chosen) + 1, dtype=np.int32),
            np.array([case.before[each] for each in chosen], np.int64),
            np.array(chosen, np.int32), case.tables[chosen][:, :width], case.group, SPLITTING,
        )  # fmt: skip

    def launched(self, chosen: list[int]) -> npt.NDArray[np.float32]:
        """fp32 [8, Hq, D]: the rows of the step, and NaNs behind them."""
        plan = upload(self.device, self.load(chosen))
        self.clear()
        self.kernels().run_layer(plan, 0, self.qkv, self.out)
        return self.device.get(self.out)

    def run(self, graphs: DecodeGraphs, chosen: list[int]) -> npt.NDArray[np.float32] | None:
        """The same by a recording; None if the step has none."""
        run = graphs.load(self.load(chosen))
        if run is None:
            return None
        self.clear()
        run(0)
        return self.device.get(self.out)

    def graphs(self) -> DecodeGraphs:
        return DecodeGraphs(self.device, self.kernels(), self.qkv, self.out, SPLITTING)

    def clear(self) -> None:
        self.device.write(self.out, np.full(self.out.shape, np.nan, np.float32))
