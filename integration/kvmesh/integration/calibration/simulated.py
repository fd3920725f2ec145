"""Rows that need queues and single requests, so are run in the simulator."""

from collections.abc import Iterator

import numpy as np

from kvmesh.backends.cost.parallel import Parallel
from kvmesh.integration.calibration.rows import Closed, Pool, Rows, Server
from kvmesh.integration.calibration.servings import Serving, figure, step_cost, workload_of
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


def closed_rows(rows: Rows) -> Iterator[Serving]:
    """C2: TTFT and TPOT of each closed loop."""
    fitted = "time of a request outside of the engine"
    for row in rows.closed:
        found = _run(row)
        first, between = _ms(found.ttft.mean), _ms(found.tpot.mean)
        late = fitted if row.request_s else ""
        yield figure(row, "ms TTFT, mean", row.ttft_ms, first, row.ttft_tolerance, late)
        yield figure(row, "ms TPOT, mean", row.tpot_ms, between)


def tail_rows(rows: Rows) -> Iterator[Serving]:
    """C7: p99 of TTFT and TPOT, of a quarter of the system: one pool for prompts, one for decode.
    Takes a minute or two."""
    for row in rows.server:
        if row.prefill is None or row.ttft_p99_ms is None or row.tpot_p99_ms is None:
            continue
        found = _disaggregated(row, row.prefill)
        first, between = _ms(found.ttft.p99), _ms(found.tpot.p99)
        yield figure(row, "ms TTFT, p99", row.ttft_p99_ms, first, row.ttft_tolerance)
        yield figure(row, "ms TPOT, p99", row.tpot_p99_ms, between)


def _ms(seconds: float | None) -> float:
    return (seconds or 0.0) * 1e3


def _disaggregated(row: Server, pool: Pool) -> Result:
    rate = row.requests_s / pool.instances
    workload = workload_of(row)
    requests = generate(workload, _TAIL_REQUESTS, rate, _SEED)
    cost = step_cost(row, workload.model, row.drafts)
    layout = Parallel(data=pool.data, expert=pool.expert)
    scenario = Scenario(
        cost.model,
        cost.device,
        (
            WorkerPool(1, layout, "prefill", step_tokens=row.step_tokens),
            WorkerPool(1, cost.parallel, "decode", int(row.sequences), row.step_tokens),
        ),
        Optimisations(
            kv=row.kv,
            expert_balance=row.routing == "placed",
            acceptance=ACCEPTANCE[: row.drafts],
        ),
        row.weights,
        row.attention,
        overheads=Overheads(request_s=row.request_s),
    )
    load = load_of(requests, cost.model.max_context, share_prefixes=False)
    return simulate(scenario, load, _SEED)


def _run(row: Closed) -> Result:
    cost = step_cost(row, None)
    scenario = Scenario(
        cost.model,
        cost.device,
        (WorkerPool(parallel=cost.parallel),),
        Optimisations(kv=row.kv, expert_balance=row.routing == "placed"),
        row.weights,
        row.attention,
        overheads=Overheads(request_s=row.request_s),
    )
    load = load_of(_requests(row), cost.model.max_context, ClosedLoop(row.concurrency), False)
    return simulate(scenario, load, _SEED)


def _requests(row: Closed) -> Workload:
    rng = np.random.default_rng(_SEED)
    count = _ROUNDS * row.concurrency
    inputs, outputs = (
        np.rint(mean * rng.uniform(1 - _SPREAD, 1 + _SPREAD, count)).astype(int).tolist()
        for mean in (row.input, row.output)
    )
    requests = (
        TraceRequest(0.0, prompt, output, tuple(range(-(-prompt // BLOCK_SIZE))))
        for prompt, output in zip(inputs, outputs, strict=True)
    )
    return Workload(tuple(requests), BLOCK_SIZE)
