"""Published results against predictions, row by row: what the simulation may be trusted with.

A row is worked out from the cost model, never looked up. Other modules add theirs by a function in
ROWS; each is called once and may give any number of rows.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kvmesh.backends.cost.price import dollars_per_mtok
from kvmesh.backends.lpu.compile import CHIP, compile_model
from kvmesh.backends.lpu.shapes import find_shape
from kvmesh.integration.calibration.kernels import Kernel, kernel_cases
from kvmesh.integration.calibration.rows import bundled_rows, read_rows
from kvmesh.integration.calibration.servings import Serving, servings
from kvmesh.integration.calibration.simulated import closed_rows, tail_rows


@dataclass(frozen=True, slots=True)
class CalibrationRow:
    """published, predicted: in `unit`. error: relative, or for a row that sums others up, the
    median of their absolute errors. tolerance: the most that abs(error) may be. tag, source: of
    what was published. fitted: the constant that was fitted on this row; the others are held out.
    why: what is known about its error.
    """

    id: str
    case: str
    unit: str
    published: float
    predicted: float
    error: float
    tolerance: float
    tag: str = "X"
    source: str = ""
    fitted: str = ""
    why: str = ""

    @property
    def within(self) -> bool:
        return abs(self.error) <= self.tolerance


def compare(
    row_id: str, case: str, unit: str, published: float, predicted: float, tolerance: float
) -> CalibrationRow:
    """A row whose error is relative to what was published."""
    error = predicted / published - 1
    return CalibrationRow(row_id, case, unit, published, predicted, error, tolerance)


_KERNEL_SOURCE = "AIConfigurator 0.12.0 kernel tables"


def kernel_rows() -> Iterator[CalibrationRow]:
    """C1: the median error of each kind of kernel and of all, then every kernel as C1.kind. A
    single kernel has no tolerance of its own, only the medians have."""
    cases = kernel_cases()
    kinds = {case.kind: [each for each in cases if each.kind == case.kind] for case in cases}
    yield _median("all kernels", cases)
    for kind, members in kinds.items():
        yield _median(kind, members)
    for each in cases:
        yield CalibrationRow(
            f"C1.{each.kind}",
            each.case,
            "us",
            each.published_us,
            each.predicted_us,
            each.error,
            float("inf"),
            source=_KERNEL_SOURCE,
        )


def _median(name: str, cases: list[Kernel]) -> CalibrationRow:
    published = statistics.median(case.published_us for case in cases)
    predicted = statistics.median(case.predicted_us for case in cases)
    error = statistics.median(abs(case.error) for case in cases)
    case = f"{name}: median error of {len(cases)}"
    fitted = {
        "moe": "compute and memory shares, floor (balanced rows)",
        "all_to_all": "link share, floors (one-sided rows)",
        "all_reduce": "link share, floor, one-shot limit",
    }.get(name, "")
    return CalibrationRow(
        "C1", case, "us", published, predicted, error, 0.15, "X", _KERNEL_SOURCE, fitted
    )


def price_rows() -> Iterator[CalibrationRow]:
    """C12: arithmetic, the stated dollars of a stated throughput at a stated price."""
    predicted = dollars_per_mtok(3.76, 3481)
    case = "DeepSeek-R1 Interactive, 3,481 tok/s per GPU at 3.76 dollars per hour"
    row = compare("C12", case, "$/Mtok", 0.300, predicted, 0.005)
    yield replace(row, source="arithmetic on a published throughput and price")


def lpu_rows() -> Iterator[CalibrationRow]:
    """C13: what the geometry of the first LPU comes to, exactly."""
    chip = replace(CHIP, clock_hz=1e9)
    operations = chip.peak_int8_ops_per_cycle * chip.clock_hz
    for case, unit, published, predicted in (
        ("INT8 peak at 1 GHz", "TOPS", 819.2, operations / 1e12),
        ("weights of four planes installed", "cycles", 40, chip.install_cycles),
        ("streams", "B/cycle", 20480, chip.stream_bytes_per_cycle),
        ("memory", "B/cycle", 56320, chip.mem_bytes_per_cycle),
    ):
        row = compare("C13", case, unit, published, predicted, 0.0)
        yield replace(row, tag="R", source="ISCA 2020, Think Fast")


def lpu_model_rows() -> Iterator[CalibrationRow]:
    """C14: a model on many chips, compiled and counted in cycles."""
    compiled = compile_model(find_shape("llama-2-70b"), 576, "fp16")
    case = f"Llama 2 70B on 576 chips, {compiled.context:,} tokens of context, FP16 cache"
    row = compare("C14", case, "tok/s/user", 300, 1 / compiled.seconds, 0.20)
    yield replace(row, tag="C", source="Groq's own claim; context and layout not published")


def serving_rows() -> Iterator[CalibrationRow]:
    """C3 to C11 and C15: whole systems in their steady state."""
    yield from map(_serving, servings(bundled_rows()))


def closed_loop_rows() -> Iterator[CalibrationRow]:
    """C2: single instances, simulated."""
    yield from map(_serving, closed_rows(bundled_rows()))


def simulated_tail_rows() -> Iterator[CalibrationRow]:
    """C7's percentiles, simulated."""
    yield from map(_serving, tail_rows(bundled_rows()))


def file_sources(path: Path) -> tuple["RowSource", ...]:
    """Of a file with published runs of one's own; raises RowsError if it cannot be used."""
    rows = read_rows(path)
    return tuple(
        lambda made=made: map(_serving, made(rows)) for made in (closed_rows, servings, tail_rows)
    )


def _serving(each: Serving) -> CalibrationRow:
    error = each.predicted / each.published - 1
    return CalibrationRow(
        each.id,
        each.case,
        each.unit,
        each.published,
        each.predicted,
        error,
        each.tolerance,
        each.tag,
        each.source,
        each.fitted,
        each.why,
    )


RowSource = Callable[[], Iterator[CalibrationRow]]
ROWS: tuple[RowSource, ...] = (
    kernel_rows,
    closed_loop_rows,
    serving_rows,
    price_rows,
    lpu_rows,
    lpu_model_rows,
)


SLOW_ROWS: tuple[RowSource, ...] = (simulated_tail_rows,)  # a minute or two


def calibration_rows(
    sources: tuple[RowSource, ...] = ROWS, done: Callable[[], None] = lambda: None
) -> list[CalibrationRow]:
    """All rows, in the order of their numbers; done is called after each source."""
    rows = []
    for source in sources:
        rows += list(source())
        done()
    return sorted(rows, key=_number)


def _number(row: CalibrationRow) -> tuple[int, bool]:
    """C1 before C1.moe before C2."""
    number, _, kernel = row.id.removeprefix("C").partition(".")
    return (int(number) if number.isdecimal() else 0), bool(kernel)
