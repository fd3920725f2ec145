"""The CUDA kernels as a subject of `kvmesh bench kernels`, timed by the device's own events."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmesh.backends.errors import BackendUnavailable
from kvmesh.integration.bench_kernels import CHUNK, KernelCase, Prepared, Timed
from kvmesh.kernels import block, reference
from kvmesh.kernels.cuda.blocks import BlockTools
from kvmesh.kernels.cuda.device import CupyDevice, Device, unavailable_reason
from kvmesh.kernels.cuda.plan import DevicePlan, Splitting, plan_step, upload
from kvmesh.kernels.cuda.step import Memory, Rule, StepKernels
from kvmesh.kernels.cuda.stream import Streams
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

Doubles = npt.NDArray[np.float64]

_TEMPLATES = 32  # different blocks; a context repeats them, each time at an address of its own
_STREAM_BYTES = 1 << 30


class Rivals(Protocol):
    """Attention that others have, on the same device and stream."""

    @property
    def missing(self) -> Sequence[str]: ...

    def decode(self, case: KernelCase) -> Sequence[Timed]: ...

    def prefill(self, case: KernelCase) -> Sequence[Timed]: ...


def open_cuda_kernels() -> "CudaKernels":
    """On this machine's GPU, beside torch's attention. Raises BackendUnavailable without a GPU."""
    reason = unavailable_reason()
    if reason is not None:
        raise BackendUnavailable(f"the CUDA kernels cannot run here: {reason}", {"cuda": reason})
    from kvmesh.integration.bench_kernels_torch import open_torch

    device = CupyDevice()
    return CudaKernels(device, open_torch(device.place))


class DeviceClock:
    """Seconds on the device. Before each measurement it streams memory: that empties the caches,
    and while the device is busy the host gets ahead of it, so no launch is waited for."""

    def __init__(self, device: Device, stream_bytes: int = _STREAM_BYTES) -> None:
        self._device = device
        self._streams = Streams(device)
        self._memory = device.zeros((stream_bytes,), np.uint8)

    def time(self, what: Timed) -> float:
        self._streams.read(self._memory)
        first = self._device.timer.mark()
        what.run()
        return self._device.timer.seconds(first, self._device.timer.mark())


class CudaKernels:
    """Implements bench_kernels.KernelBackend. stream_bytes: what the bandwidth is measured over."""

    def __init__(self, device: Device, rivals: Rivals, stream_bytes: int = _STREAM_BYTES) -> None:
        self._device, self._rivals = device, rivals
        self._streams = Streams(device)
        self._from, self._to = (device.zeros((stream_bytes,), np.uint8) for _ in range(2))

    @property
    def machine(self) -> str:
        facts = self._device.describe()
        return f"{facts.name}, {facts.architecture}, {facts.memory_bytes / 2**30:.0f} GiB"

    @property
    def missing(self) -> Sequence[str]:
        return self._rivals.missing

    def clock(self) -> DeviceClock:
        return DeviceClock(self._device, self._from.size)

    def bandwidths(self, threads: int) -> Sequence[Timed]:
        """threads: of the host, which say nothing here."""
        size = int(self._from.size)
        return (
            Timed("read", 0, size, lambda: self._streams.read(self._from)),
            Timed("copy", 0, 2 * size, lambda: self._streams.copy(self._to, self._from)),
        )

    def prepare(self, case: KernelCase) -> Prepared:
        if case.op == "seal":
            return self._seal(case)
        new = 1 if case.op == "decode" else CHUNK
        context = _Context(self._device, case, new)
        if case.op == "prefill":
            context.seal_filled()  # once: the rows attend to the blocks that they fill themselves
        run = _recorded(self._device, context.attend)
        subject = Timed(f"kvmesh {case.codec}", 0, context.read_bytes, run)
        rivals = self._rivals.decode if case.op == "decode" else self._rivals.prefill
        return Prepared(subject, rivals(case), context.error)

    def _seal(self, case: KernelCase) -> Prepared:
        context = _Context(self._device, replace(case, context=0), case.context)
        taken = sum(int(each.nbytes) for each in context.qkv[1:])
        run = _recorded(self._device, context.seal)
        source, target = (self._device.zeros((taken,), np.uint8) for _ in range(2))
        copy = Timed("copy of the input", 32, 2 * taken, lambda: self._streams.copy(target, source))
        return Prepared(Timed(f"kvmesh {case.codec}", 0, taken, run), [copy], lambda: None)


def _recorded(device: Device, work: Callable[[], None]) -> Callable[[], None]:
    """The work as one recorded launch where the device can: as a backend runs it."""
    work()  # loads the kernels
    try:
        return device.capture(work)
    except Exception:  # CuPy's classes, and the driver's behind them
        return work


@dataclass(frozen=True, slots=True)
class _Templates:
    """Different sealed blocks of one layer: bytes uint8 [n, block_bytes], and their K and V as
    decoded, fp64 [n, 64, heads, dim]."""

    data: npt.NDArray[np.uint8]
    keys: Doubles
    values: Doubles


def _templates(layout: KvLayout, count: int, rng: np.random.Generator) -> _Templates:
    data = np.zeros((count, layout.block_bytes), np.uint8)
    centers = np.zeros((2, layout.num_kv_heads, layout.head_dim), np.float32)
    shape = (2, BLOCK_SIZE, layout.num_kv_heads, layout.head_dim)
    decoded = []
    for row in data:
        k, v = rng.standard_normal(shape).astype(np.float32)
        reference.seal_layer(layout, row, 0, (k, v), centers)
        block.finish(layout, row)
        decoded.append(reference.decode_layer(layout, row, 0, centers))
    return _Templates(
        data,
        np.array([k for k, _ in decoded], np.float64),
        np.array([v for _, v in decoded], np.float64),
    )


class _Context:
    """`batch` sequences of `case.context` sealed tokens that get `new` more each, in one step."""

    def __init__(self, device: Device, case: KernelCase, new: int) -> None:
        self._device, self._case, self._new = device, case, new
        self._layout = KvLayout(1, case.kv_heads, case.head_dim, case.codec, bytes(16))
        rng = np.random.default_rng(0)
        sealed, filled = case.context // BLOCK_SIZE, new // BLOCK_SIZE
        self._templates = _templates(self._layout, min(_TEMPLATES, max(1, sealed)), rng)
        # Blocks lie in no order, as they do after a while in any pool.
        self._tables = rng.permutation(case.batch * (sealed + filled + 1)).astype(np.int32)
        self._tables = self._tables.reshape(case.batch, -1)
        self._chosen = rng.integers(0, len(self._templates.data), (case.batch, sealed))
        self._memory = self._fill_memory(sealed)
        self._tools = BlockTools(device, self._layout)
        self._kernels = StepKernels(device, self._layout, self._memory)
        rows = case.batch * new
        query = (rows, case.kv_heads * case.group, case.head_dim)
        shapes = (query, *2 * [(rows, case.kv_heads, case.head_dim)])
        self._host = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        q, k, v = (device.put(each) for each in self._host)
        self.qkv = q, k, v
        self._out = device.zeros(query, np.float32)
        self._plan = self._upload_plan()

    @property
    def read_bytes(self) -> int:
        """Of the sealed history: the planes, without headers and trailers."""
        return int(self._chosen.size) * self._layout.payload_bytes

    def attend(self) -> None:
        self._kernels.attend(self._plan, 0, self.qkv, self._out, Rule())

    def seal(self) -> None:
        """Every block that the step fills, with header and checksum."""
        self._kernels.seal(self._plan, 0, self.qkv[1:])
        self._tools.finish(self._memory.blocks, self._plan)

    def seal_filled(self) -> None:
        self._kernels.seal(self._plan, 0, self.qkv[1:])

    def error(self) -> float:
        """Of the first new token of the first sequence, in all heads."""
        found = self._device.get(self._out)[0].astype(np.float64)
        q, k, v = (each[0].astype(np.float64) for each in self._host)
        times = np.bincount(self._chosen[0], minlength=len(self._templates.data))
        expected = attend_repeated(q, (self._templates.keys, self._templates.values), times, (k, v))
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    def _fill_memory(self, sealed: int) -> Memory:
        device, layout, case = self._device, self._layout, self._case
        pool = device.zeros((self._tables.size, layout.block_bytes), np.uint8)
        templates = device.put(self._templates.data)
        to, come_from = self._tables[:, :sealed].ravel(), self._chosen.ravel()
        BlockTools(device, layout).move(pool, to, templates, come_from)
        per_head = (case.kv_heads, case.head_dim)
        tails = device.zeros((case.batch, 1, 2, BLOCK_SIZE, *per_head), np.float32)
        return Memory(pool, tails, device.zeros((1, 2, *per_head), np.float32))

    def _upload_plan(self) -> DevicePlan:
        case = self._case
        plan = plan_step(
            np.arange(case.batch + 1, dtype=np.int32) * np.int32(self._new),
            np.full(case.batch, case.context, np.int64),
            np.arange(case.batch, dtype=np.int32),
            self._tables, case.group, Splitting(),
        )  # fmt: skip
        return upload(self._device, plan)


def attend_repeated(
    q: Doubles, kv: tuple[Doubles, Doubles], times: npt.NDArray[np.int64],
    own: tuple[Doubles, Doubles],
) -> Doubles:  # fmt: skip
    """Attention by the definition over blocks of which block i comes times[i] times, and one token
    more. q [Hq, D]; kv [n, 64, Hkv, D]; own [Hkv, D]. Returns fp64 [Hq, D].

    A token that comes n times has n times its weight, whatever the order.
    """
    keys, values = (each.reshape(-1, *each.shape[2:]) for each in kv)
    keys, values = (
        np.concatenate((each, one[None])) for each, one in zip((keys, values), own, strict=True)
    )
    counts = np.append(np.repeat(times, BLOCK_SIZE), 1)
    group = len(q) // keys.shape[1]
    out = np.empty_like(q)
    for head, row in enumerate(q):
        scores = keys[:, head // group] @ row * q.shape[1] ** -0.5
        weights = counts * np.exp(scores - scores.max())
        out[head] = weights @ values[:, head // group] / weights.sum()
    return out
