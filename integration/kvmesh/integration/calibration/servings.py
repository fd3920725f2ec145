"""Rows of whole systems: what was published of a run, and the same run predicted."""

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.cost.parallel import Formats, Options, Parallel
from kvmesh.backends.cost.step import StepCost
from kvmesh.backends.devices import load_device
from kvmesh.integration.planning.lengths import Lengths
from kvmesh.integration.planning.steady import Limits, SteadyState, Traffic
from kvmesh.integration.planning.traffic import Workload, load_workload

Row = dict[str, Any]


class Serving(NamedTuple):
    """One published figure of a run and its prediction. fitted: the constant that was fitted on
    it; why: what is known about its error."""

    id: str
    case: str
    unit: str
    published: float
    predicted: float
    tolerance: float
    tag: str
    source: str
    fitted: str
    why: str


@cache
def _tables() -> dict[str, Any]:
    path = files("kvmesh.integration.calibration") / "servings.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


def rows_of(kind: str) -> list[Row]:
    """The rows of one kind with the file's defaults."""
    tables = _tables()
    return [{**tables["default"], **row} for row in tables.get(kind, [])]


def step_cost(row: Row, prefix: str = "", drafts: int = 0) -> StepCost:
    """Of a row's instance; prefix: of the fields of one pool."""
    degrees = {name: row.get(prefix + name, 1) for name in ("tensor", "data", "expert", "pipeline")}
    return StepCost(
        load_device(row["device"]),
        load_shape(row.get("model") or workload_of(row).model or ""),
        Parallel(**degrees),
        Formats(row["weights"], row["kv"], row.get("attention")),
        Options(
            row["routing"],
            drafts,
            overlap=row.get("overlap", False),
            exchange=row.get("exchange", "bf16"),
        ),
    )


def workload_of(row: Row) -> Workload:
    """The row's workload, its outputs scaled to the run's own mean if that is given."""
    workload = load_workload(row["workload"])
    if "output_mean" not in row:
        return workload
    output: Lengths = workload.output.model_copy(update={"mean_tokens": row["output_mean"]})
    return workload.model_copy(update={"output": output})


def offline_rows() -> Iterator[Serving]:
    """C3, C4, C8 to C11, C15: output tokens per second and device of a run of all samples."""
    for row in rows_of("offline"):
        workload = workload_of(row)
        traffic = Traffic(workload.input, workload.output)
        limits = Limits(row["sequences"], row["step_tokens"])
        cost = step_cost(row)
        samples = row["samples"] / row.get("instances", 1)
        _, tokens_s = SteadyState(cost, traffic, limits).offline(samples)
        yield figure(row, "tok/s/GPU", row["published"], tokens_s / cost.parallel.devices)


def figure(
    row: Row, unit: str, published: float, predicted: float, tolerance: float | None = None
) -> Serving:
    return Serving(
        row["id"],
        row["case"],
        unit,
        published,
        predicted,
        row["tolerance"] if tolerance is None else tolerance,
        row["tag"],
        row["source"],
        row.get("fitted", ""),
        row.get("why", ""),
    )


def servings() -> Iterator[Serving]:
    """All of servings.toml."""
    yield from offline_rows()
