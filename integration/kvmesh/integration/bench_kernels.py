"""How fast the kernels are beside the attention that others have, in one run. Pure.

A backend makes each case ready: the subject, its rivals on the same keys and values, and the error
of the subject's output. The runner only takes turns between them and the machine's bandwidth, so
that whatever else the machine does meets all alike.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Op = Literal["decode", "seal", "prefill"]

OPS: tuple[Op, ...] = ("decode", "seal", "prefill")
CONTEXTS = (4096, 32768, 131072)
CHUNK = 512  # queries of a prefill, tokens of a seal
_SLOW = 3.0  # a rival that takes so many times the fastest of its width is measured a few times
_FEW = 3


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One thing to measure. context: tokens that are sealed before the queries; for seal, tokens
    that are sealed. group: query heads per KV head."""

    op: Op
    codec: str
    context: int
    batch: int = 1
    group: int = 4
    kv_heads: int = 8
    head_dim: int = 128
    threads: int = 2


@dataclass(frozen=True, slots=True)
class Timed:
    """Something that runs to its end. width: bits of a stored element, 0 where that means nothing.

    moved: bytes that must be read (and written, for copies and seals: see each op's row).
    """

    name: str
    width: int
    moved: int
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A case, ready to run. error: the subject's relative output error, see KernelRow."""

    subject: Timed
    rivals: Sequence[Timed]
    error: Callable[[], float | None]


class KernelBackend(Protocol):
    """What `kvmesh bench kernels --backend` chooses."""

    @property
    def machine(self) -> str: ...

    @property
    def missing(self) -> Sequence[str]:
        """Rivals that are not installed or do not run here, with the reason."""
        ...

    def bandwidths(self, threads: int) -> Sequence[Timed]:
        """`read`: streams memory through the processor. `copy`: both bytes read and written."""
        ...

    def prepare(self, case: KernelCase) -> Prepared: ...


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One case beside one rival.

    seconds, baseline_seconds: medians. gb_per_s: bytes that the subject must read (seal: fp32 bytes
    that it takes in) a second, and read_share the same in units of a streaming read in this run.
    error: |out - exact| / |exact|, exact being fp64 attention over the same decoded codes; None
    where nothing is rounded. fastest: no other rival of its width was faster.
    """

    op: str
    codec: str
    context: int
    batch: int
    group: int
    kv_heads: int
    head_dim: int
    threads: int
    seconds: float
    repetitions: int
    gb_per_s: float
    read_share: float
    error: float | None
    baseline: str
    baseline_width: int
    baseline_seconds: float
    baseline_repetitions: int
    baseline_gb_per_s: float
    ratio: float
    fastest: bool


@dataclass(frozen=True, slots=True)
class KernelReport:
    """GB/s of the machine over the whole run, and a row for each case and rival."""

    machine: str
    missing: Sequence[str]
    read_gb_per_s: float
    copy_gb_per_s: float
    rows: Sequence[KernelRow]


@dataclass(frozen=True, slots=True)
class Clock:
    """now: seconds, monotonic. rest: called before each measurement, so that threads which the
    one before left spinning are asleep."""

    now: Callable[[], float]
    rest: Callable[[], object]

    def time(self, what: Timed) -> float:
        self.rest()
        began = self.now()
        what.run()
        return self.now() - began


def cases(
    ops: Sequence[Op], codecs: Sequence[str], contexts: Sequence[int], shape: KernelCase
) -> list[KernelCase]:
    """Every op with every codec and context. A prefill takes the shortest context only: its work
    grows as fast as a decode's, times CHUNK. A seal has one, its CHUNK, on one thread and on all.
    shape: the rest."""
    found: list[KernelCase] = []
    for op in ops:
        if op == "seal":
            threads = sorted({1, shape.threads})
            found += [
                replace(shape, op=op, codec=codec, context=CHUNK, threads=count)
                for codec in codecs
                for count in threads
            ]
        else:
            found += [
                replace(shape, op=op, codec=codec, context=context)
                for context in (contexts if op == "decode" else [min(contexts)])
                for codec in codecs
            ]
    return found


def bench_kernels(
    backend: KernelBackend,
    wanted: Sequence[KernelCase],
    repetitions: int,
    clock: Clock,
    on_case: Callable[[], object],
) -> KernelReport:
    """Raises ValueError if there is no case."""
    if not wanted:
        raise ValueError("no case to measure, give at least one op, codec and context")
    measured = []
    for case in wanted:
        measured.append(_measure(backend, case, repetitions, clock))
        on_case()
    read = statistics.median(x for one in measured for x in one.bandwidths["read"])
    copy = statistics.median(x for one in measured for x in one.bandwidths["copy"])
    rows = [row for one in measured for row in _rows(one, read)]
    return KernelReport(backend.machine, list(backend.missing), read, copy, rows)


@dataclass(frozen=True, slots=True)
class _Measured:
    """Seconds of each run; bandwidths: GB/s of each run, by name."""

    case: KernelCase
    subject: Timed
    seconds: Sequence[float]
    rivals: Sequence[tuple[Timed, Sequence[float]]]
    bandwidths: dict[str, list[float]]
    error: float | None


def _measure(backend: KernelBackend, case: KernelCase, repetitions: int, clock: Clock) -> _Measured:
    ready = backend.prepare(case)
    streams = backend.bandwidths(case.threads)
    everything = [ready.subject, *streams, *ready.rivals]
    first = {id(one): min(clock.time(one) for _ in range(2)) for one in everything}
    fastest: dict[int, float] = {}
    for rival in ready.rivals:
        fastest[rival.width] = min(fastest.get(rival.width, math.inf), first[id(rival)])
    seconds: dict[int, list[float]] = {id(one): [] for one in everything}
    for number in range(repetitions):
        for one in everything:
            slow = one.width in fastest and first[id(one)] > _SLOW * fastest[one.width]
            if not (slow and one is not ready.subject and number >= _FEW):
                seconds[id(one)].append(clock.time(one))
    return _Measured(
        case,
        ready.subject,
        seconds[id(ready.subject)],
        [(rival, seconds[id(rival)]) for rival in ready.rivals],
        {one.name: [one.moved / s / 1e9 for s in seconds[id(one)]] for one in streams},
        ready.error(),
    )


def _rows(one: _Measured, read: float) -> list[KernelRow]:
    case, own = one.case, statistics.median(one.seconds)
    medians = [(rival, statistics.median(seconds), seconds) for rival, seconds in one.rivals]
    best: dict[int, float] = {}
    for rival, median, _ in medians:
        best[rival.width] = min(best.get(rival.width, math.inf), median)
    rate = one.subject.moved / own / 1e9
    return [
        KernelRow(
            case.op, case.codec, case.context, case.batch, case.group, case.kv_heads,
            case.head_dim, case.threads, own, len(one.seconds), rate, rate / read, one.error,
            rival.name, rival.width, median, len(seconds), rival.moved / median / 1e9,
            median / own, median == best[rival.width],
        )
        for rival, median, seconds in medians
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ratio:
    """One case against the fastest rival of each width; None where none ran."""

    op: str
    codec: str
    context: int
    threads: int
    fp32: KernelRow | None
    half: KernelRow | None


def ratios(rows: Sequence[KernelRow]) -> list[Ratio]:
    """The fastest rivals in 32 and in 16 bits of every case, in the order measured."""
    found: dict[tuple[str, str, int, int], dict[int, KernelRow]] = {}
    for row in rows:
        key = row.op, row.codec, row.context, row.threads
        best = found.setdefault(key, {})
        if row.fastest:
            best[row.baseline_width] = row
    return [Ratio(*key, best.get(32), best.get(16)) for key, best in found.items()]
