"""The CPU kernels and what they are measured beside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvmesh.integration.bench_kernels import CHUNK, KernelCase, Prepared, Timed
from kvmesh.integration.bench_rivals import Rivals
from kvmesh.integration.machine import describe_machine
from kvmesh.kernels import reference
from kvmesh.kernels.cpu import simd, stream
from kvmesh.kernels.cpu.decode import attend_decode
from kvmesh.kernels.cpu.decode_inputs import Cache, Queries
from kvmesh.kernels.cpu.step import StepPlan, run_layer, seal_blocks
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

Floats = npt.NDArray[np.float32]

_STREAM_BYTES = 256 << 20  # far beyond any cache
_SEED = 20504


@dataclass(frozen=True, slots=True)
class Data:
    """k, v: fp32 [batch, kv heads, tokens, D]; q: fp32 [batch, query heads, queries, D]."""

    k: Floats
    v: Floats
    q: Floats
    centers: Floats  # fp32 [2, kv heads, D]


def make_data(case: KernelCase, tokens: int, queries: int) -> Data:
    """Gaussian, the keys and values around a mean, as those of models are; scores of unit size."""
    rng = np.random.default_rng(_SEED)
    centers = rng.standard_normal((2, case.kv_heads, case.head_dim), np.float32)
    shape = (case.batch, case.kv_heads, tokens, case.head_dim)
    k, v = (rng.standard_normal(shape, np.float32) + c[:, None] for c in centers)
    heads = case.kv_heads * case.group
    q = rng.standard_normal((case.batch, heads, queries, case.head_dim), np.float32)
    return Data(k, v, q, centers)


class CpuKernels:
    """A KernelBackend. Keeps the keys and values of one context: they are made but once a codec."""

    def __init__(self) -> None:
        self._rivals = Rivals()
        self._memory = np.ones(_STREAM_BYTES // 8, np.int64)
        self._made: tuple[KernelCase, Data] | None = None

    @property
    def machine(self) -> str:
        return f"{describe_machine()}, {simd.CHOSEN}"

    @property
    def missing(self) -> Sequence[str]:
        return self._rivals.missing

    def empty_caches(self) -> None:
        """Reads far more than they hold, on one thread that no kernel uses: all start alike."""
        self._memory.sum()

    def bandwidths(self, threads: int) -> Sequence[Timed]:
        memory, half = self._memory, len(self._memory) // 2
        return (
            Timed("read", 0, memory.nbytes, lambda: stream.read(memory, threads)),
            Timed(
                "copy", 0, memory.nbytes,
                lambda: stream.copy(memory[:half], memory[half:], threads),
            ),
        )  # fmt: skip

    def prepare(self, case: KernelCase) -> Prepared:
        if case.op == "seal":
            return self._seal(case)
        queries = 1 if case.op == "decode" else CHUNK
        data = self._data(case, queries)
        return self._decode(case, data) if case.op == "decode" else self._prefill(case, data)

    def _data(self, case: KernelCase, queries: int) -> Data:
        """Those of the last case again, if only its codec was another."""
        key = replace(case, codec="")
        if self._made is None or self._made[0] != key:
            self._made = None  # first give its memory back
            tokens = case.context + (CHUNK if case.op == "prefill" else 0)
            self._made = key, make_data(case, tokens, queries)
        return self._made[1]

    def _decode(self, case: KernelCase, data: Data) -> Prepared:
        layout, blocks = sealed(case, data)
        count = case.context // BLOCK_SIZE
        cache = Cache(layout, 0, blocks, data.centers)
        queries = Queries(
            np.ascontiguousarray(data.q.transpose(0, 2, 1, 3)),
            np.arange(case.batch * count, dtype=np.int32).reshape(case.batch, count),
            np.full(case.batch, count),
            np.full(case.batch, case.context),
        )
        output = attend_decode(cache, queries, None, case.threads).output[:, 0]
        return Prepared(
            Timed(
                f"kvmesh {case.codec}", 0, _code_bytes(layout) * case.batch * count,
                lambda: attend_decode(cache, queries, None, case.threads),
            ),
            self._rivals.attention(data.q, data.k, data.v, case.threads),
            lambda: relative_error(output, exact(layout, blocks, data, case)),
        )  # fmt: skip

    def _prefill(self, case: KernelCase, data: Data) -> Prepared:
        layout, blocks = sealed(case, data)
        count = case.context // BLOCK_SIZE
        width = count + CHUNK // BLOCK_SIZE
        pool = np.zeros((case.batch * width, layout.block_bytes), np.uint8)
        tables = np.arange(case.batch * width, dtype=np.int32).reshape(case.batch, width)
        pool[tables[:, :count].reshape(-1)] = blocks
        tails = np.zeros((case.batch, 1, 2, BLOCK_SIZE, case.kv_heads, case.head_dim), np.float32)
        plan = StepPlan(
            np.arange(case.batch + 1, dtype=np.int32) * CHUNK,
            np.full(case.batch, case.context, np.int64),
            np.arange(case.batch, dtype=np.int32),
            tables,
        )
        q, k, v = (
            x.transpose(0, 2, 1, 3)[:, -CHUNK:].reshape(-1, x.shape[1], case.head_dim)
            for x in (data.q, data.k, data.v)
        )
        out = np.empty(q.shape, np.float32)

        def run() -> None:
            run_layer(
                layout, pool, tails, plan, 0, (q, k, v), data.centers[None], out, case.threads
            )

        run()
        first = out.reshape(case.batch, CHUNK, *out.shape[1:])[:, 0].copy()
        return Prepared(
            Timed(f"kvmesh {case.codec}", 0, _code_bytes(layout) * case.batch * count, run),
            self._rivals.attention(data.q, data.k, data.v, case.threads),
            lambda: relative_error(first, exact(layout, blocks, data, case, own=1)),
        )

    def _seal(self, case: KernelCase) -> Prepared:
        data = make_data(case, case.context, 1)
        layout = _layout(case)
        run, _ = sealing(case, data, layout)
        return Prepared(
            Timed(f"kvmesh {case.codec}", 0, data.k.nbytes + data.v.nbytes, run),
            self._rivals.casts(data.k, data.v, case.threads),
            lambda: None,  # its bytes are the reference's, which tests compare
        )


def _layout(case: KernelCase) -> KvLayout:
    return KvLayout(1, case.kv_heads, case.head_dim, case.codec, bytes(16))


def _code_bytes(layout: KvLayout) -> int:
    """Of one block's layer: codes and scales, which attention reads."""
    at = layout.planes(0)
    return at.end - at.key_codes


def sealing(
    case: KernelCase, data: Data, layout: KvLayout
) -> tuple[Callable[[], None], npt.NDArray[np.uint8]]:
    """What seals the first `context` tokens with checksums, and the blocks that it fills."""
    count = case.context // BLOCK_SIZE
    blocks = np.zeros((case.batch * count, layout.block_bytes), np.uint8)
    tails = np.empty(
        (case.batch * count, 1, 2, BLOCK_SIZE, case.kv_heads, case.head_dim), np.float32
    )
    for kind, x in enumerate((data.k, data.v)):
        whole = x[:, :, : case.context].transpose(0, 2, 1, 3)
        tails[:, 0, kind] = whole.reshape(-1, BLOCK_SIZE, case.kv_heads, case.head_dim)
    ids = np.arange(len(blocks))

    def run() -> None:
        seal_blocks(layout, blocks, ids, tails, data.centers[None], case.threads)

    return run, blocks


def sealed(case: KernelCase, data: Data) -> tuple[KvLayout, npt.NDArray[np.uint8]]:
    layout = _layout(case)
    run, blocks = sealing(case, data, layout)
    run()
    return layout, blocks


def exact(
    layout: KvLayout, blocks: npt.NDArray[np.uint8], data: Data, case: KernelCase, own: int = 0
) -> npt.NDArray[np.float64]:
    """fp64 attention of the first query over the decoded blocks, and over the first `own` tokens
    after them as they are: [batch, query heads, D]. Block by block, merged exactly."""
    q = data.q[:, :, 0].astype(np.float64) / np.sqrt(case.head_dim)
    shape = (case.batch, case.kv_heads, case.group)
    q = q.reshape(*shape, case.head_dim)
    peak, total = np.full(shape, -np.inf), np.zeros(shape)
    out = np.zeros(q.shape)
    count = case.context // BLOCK_SIZE
    for s in range(case.batch):
        for n in range(count + bool(own)):
            if n == count:
                more = slice(case.context, case.context + own)
                k, v = (x[s, :, more].astype(np.float64) for x in (data.k, data.v))
            else:
                both = reference.decode_layer(layout, blocks[s * count + n], 0, data.centers)
                k, v = (x.transpose(1, 0, 2) for x in both)
            scores = np.einsum("hgd,htd->hgt", q[s], k)
            top = np.maximum(peak[s], scores.max(axis=-1))
            fade, weights = np.exp(peak[s] - top), np.exp(scores - top[..., None])
            peak[s], total[s] = top, total[s] * fade + weights.sum(axis=-1)
            out[s] = out[s] * fade[..., None] + np.einsum("hgt,htd->hgd", weights, v)
    out /= total[..., None]
    return out.reshape(case.batch, -1, case.head_dim)


def relative_error(found: Floats, wanted: npt.NDArray[np.float64]) -> float:
    """|found - wanted| / |wanted| over all heads."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
