"""Rows of whole systems in their steady state: what was published of a run, and the same run
predicted."""

from collections.abc import Iterator
from typing import NamedTuple

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.cost.parallel import Formats, Options, Parallel
from kvmesh.backends.cost.step import StepCost
from kvmesh.backends.devices import load_device
from kvmesh.integration.calibration.rows import Offline, Row, Rows, RowsError, Run, Server
from kvmesh.integration.planning.evaluate import mean_accepted
from kvmesh.integration.planning.steady import Limits, SteadyState, Traffic
from kvmesh.integration.planning.traffic import Workload, load_workload


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


def servings(rows: Rows) -> Iterator[Serving]:
    """C3 to C11 and C15, or those of another file."""
    for offline in rows.offline:
        yield _offline(offline)
    for server in rows.server:
        yield from _server(server)


def step_cost(row: Row, model: str | None, drafts: int = 0) -> StepCost:
    """Of a row's instance; model: the workload's, if the row names none. Raises RowsError if
    neither does, DeviceError or ShapeError for what is unknown or cannot be."""
    name = row.model or model
    if name is None:
        raise RowsError(f"row {row.id}: model is missing, and its workload names none")
    return StepCost(
        load_device(row.device),
        load_shape(name),
        Parallel(row.tensor, row.data, row.expert, row.pipeline),
        Formats(row.weights, row.kv, row.attention),
        Options(row.routing, drafts, overlap=row.overlap, exchange=row.exchange),
    )


def workload_of(row: Run) -> Workload:
    """The row's workload, its outputs scaled to the run's own mean if that is given."""
    workload = load_workload(row.workload)
    if row.output_mean is None:
        return workload
    output = workload.output.model_copy(update={"mean_tokens": row.output_mean})
    return workload.model_copy(update={"output": output})


def _offline(row: Offline) -> Serving:
    """Output tokens per second and device of a run of all samples."""
    workload = workload_of(row)
    cost = step_cost(row, workload.model)
    traffic = Traffic(workload.input, workload.output)
    state = SteadyState(cost, traffic, Limits(row.sequences, row.step_tokens))
    _, tokens_s = state.offline(row.samples / row.instances)
    return figure(row, "tok/s/GPU", row.published, tokens_s / cost.parallel.devices)


def _server(row: Server) -> Iterator[Serving]:
    """Throughput and mean TPOT at the rate of the run."""
    workload = workload_of(row)
    # Where prompts have devices of their own, decoding workers compute none.
    traffic = Traffic(workload.input, workload.output, 1.0 if row.prefill else 0.0)
    limits = Limits(row.sequences, row.step_tokens, mean_accepted(row.drafts))
    cost = step_cost(row, workload.model, row.drafts)
    state = SteadyState(cost, traffic, limits)
    rate, samples = row.requests_s / row.instances, row.samples / row.instances
    steady, tokens_s = state.loadgen(rate, samples)
    devices = row.devices or row.instances * cost.parallel.devices
    yield figure(row, "tok/s/GPU", row.tokens_s, tokens_s * row.instances / devices)
    yield figure(row, "ms TPOT, mean", row.tpot_ms, steady.tpot_s * 1e3)


def figure(
    row: Row,
    unit: str,
    published: float,
    predicted: float,
    tolerance: float | None = None,
    fitted: str = "",
) -> Serving:
    """tolerance, fitted: instead of the row's."""
    return Serving(
        row.id,
        row.case,
        unit,
        published,
        predicted,
        row.tolerance if tolerance is None else tolerance,
        row.tag,
        row.source,
        fitted or row.fitted,
        row.why,
    )
