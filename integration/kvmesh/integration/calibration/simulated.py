"""Rows that need queues and single requests, so are run in the simulator."""

from collections.abc import Iterator

import numpy as np

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.cost.parallel import Parallel
from kvmesh.integration.calibration.servings import (
    Row,
    Serving,
    figure,
    rows_of,
    step_cost,
    workload_of,
)
from kvmesh.integration.planning.choice import ACCEPTANCE
from kvmesh.integration.planning.requests import generate
from kvmesh.integration.simulate import (
    ClosedLoop,
    Optimisations,
    Overheads,
    Result,
    Scenario,
    WorkerPool,
    load_of,
    simulate,
)
from kvmesh.integration.workload import TraceRequest, Workload
from kvmesh.kernels.layout import BLOCK_SIZE

_SPREAD = 0.2  # of lengths around their mean: without, all requests would end in the same step
_ROUNDS = 10
_SEED = 1
_TAIL_REQUESTS = 2200  # enough for the batch to fill
_TTFT_TOLERANCE, _TPOT_TOLERANCE = 0.20, 0.10


def closed_rows() -> Iterator[Serving]:
    """C2: TTFT and TPOT of each closed loop."""
    for row in rows_of("closed"):
        found = _run(row)
        ttft = {**row, "fitted": "time of a request outside of the engine"}
        first, between = _ms(found.ttft.mean), _ms(found.tpot.mean)
        yield figure(ttft, "ms TTFT, mean", row["ttft_ms"], first, _TTFT_TOLERANCE)
        yield figure(row, "ms TPOT, mean", row["tpot_ms"], between, _TPOT_TOLERANCE)


def tail_rows() -> Iterator[Serving]:
    """C7: p99 of TTFT and TPOT, of a quarter of the system: one pool for prompts, one for decode.
    Takes a minute or two."""
    for row in rows_of("server"):
        if "ttft_p99_ms" in row:
            found = _disaggregated(row)
            published, tolerance = row["ttft_p99_ms"], row["ttft_tolerance"]
            yield figure(row, "ms TTFT, p99", published, _ms(found.ttft.p99), tolerance)
            yield figure(row, "ms TPOT, p99", row["tpot_p99_ms"], _ms(found.tpot.p99))


def _ms(seconds: float | None) -> float:
    return (seconds or 0.0) * 1e3


def _disaggregated(row: Row) -> Result:
    pool = row["prefill"]
    rate = row["requests_s"] / pool["instances"]
    requests = generate(workload_of(row), _TAIL_REQUESTS, rate, _SEED)
    cost = step_cost(row, row["drafts"])
    layout = Parallel(data=pool["data"], expert=pool["expert"])
    tokens = row["step_tokens"]
    scenario = Scenario(
        cost.model,
        cost.device,
        (
            WorkerPool(1, layout, "prefill", step_tokens=tokens),
            WorkerPool(1, cost.parallel, "decode", row["sequences"], tokens),
        ),
        Optimisations(
            kv=row["kv"],
            expert_balance=row["routing"] == "placed",
            acceptance=ACCEPTANCE[: row["drafts"]],
        ),
        row["weights"],
        row["attention"],
        overheads=Overheads(request_s=row["request_s"]),
    )
    load = load_of(requests, cost.model.max_context, share_prefixes=False)
    return simulate(scenario, load, _SEED)


def _run(row: Row) -> Result:
    cost = step_cost(row)
    scenario = Scenario(
        load_shape(row["model"]),
        cost.device,
        (WorkerPool(parallel=cost.parallel),),
        Optimisations(kv=row["kv"], expert_balance=row["routing"] == "placed"),
        row["weights"],
        overheads=Overheads(request_s=row["request_s"]),
    )
    load = load_of(_requests(row), cost.model.max_context, ClosedLoop(row["concurrency"]), False)
    return simulate(scenario, load, _SEED)


def _requests(row: Row) -> Workload:
    rng = np.random.default_rng(_SEED)
    count = _ROUNDS * row["concurrency"]
    inputs, outputs = (
        np.rint(row[name] * rng.uniform(1 - _SPREAD, 1 + _SPREAD, count)).astype(int).tolist()
        for name in ("input", "output")
    )
    requests = (
        TraceRequest(0.0, prompt, output, tuple(range(-(-prompt // BLOCK_SIZE))))
        for prompt, output in zip(inputs, outputs, strict=True)
    )
    return Workload(tuple(requests), BLOCK_SIZE)
