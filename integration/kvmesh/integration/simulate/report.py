"""A result as plain data and as a picture; everything says that it is simulated."""

from dataclasses import asdict
from typing import Any

from kvmesh.integration.plot_scale import Axis
from kvmesh.integration.plots import Line, LinePlot, line_plot
from kvmesh.integration.serve_report import Limits
from kvmesh.integration.simulate.result import Result
from kvmesh.integration.simulate.scenario import Scenario, WorkerPool
from kvmesh.integration.simulate.verdict import Verdict


def scenario_record(scenario: Scenario) -> dict[str, Any]:
    """What was simulated, by names."""
    return {
        "model": scenario.model.name,
        "devices": scenario.devices,
        "pools": [_pool_record(scenario, pool) for pool in scenario.pools],
        "options": asdict(scenario.options),
        "weights": scenario.weights,
        "attention_weights": scenario.attention_weights,
        "failures": [asdict(failure) for failure in scenario.failures],
        "overheads": asdict(scenario.overheads),
    }


def _pool_record(scenario: Scenario, pool: WorkerPool) -> dict[str, Any]:
    return {
        "role": pool.role,
        "workers": pool.workers,
        "device": scenario.device_name(pool),
        "parallel": asdict(pool.parallel),
        "slots": pool.slots,
        "step_tokens": pool.step_tokens,
    }


def result_record(result: Result, limits: Limits) -> dict[str, Any]:
    """Without the single requests."""
    record = {
        name: getattr(result, name)
        for name in (
            "simulated", "seconds", "requests", "finished", "too_long", "errors", "first_error",
            "migrations", "input_tokens", "output_tokens", "prefix_hits", "devices", "device_s",
            "events",
        )
    }  # fmt: skip
    for name in ("ttft", "tpot", "itl", "duration", "legacy", "native", "steady"):
        record[name] = asdict(getattr(result, name))
    record["total_tokens_per_s_device"] = result.total_tokens_per_s_device
    record["good"] = result.good(limits)
    record["goodput_per_s"] = result.goodput_per_s(limits)
    record["pools"] = [asdict(pool) for pool in result.pools]
    return record


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    checks = [{**asdict(check), "met": check.met} for check in verdict.checks]
    return {"met": verdict.met, "binding": verdict.binding, "checks": checks}


def queue_plot(result: Result, title: str) -> str:
    """SVG: requests that wait and run in each pool over simulated time."""
    lines = []
    for pool in result.pools:
        name = "" if pool.role == "both" else f"{pool.role} "
        queue = pool.queue
        running = zip(queue.at, map(float, queue.running), strict=True)
        waiting = zip(queue.at, map(float, queue.waiting), strict=True)
        lines.append(Line(f"{name}running", tuple(running)))
        lines.append(Line(f"{name}waiting", tuple(waiting), dashed=True))
    plot = LinePlot(
        title,
        Axis("simulated seconds"),
        Axis("requests", low=0),
        lines,
        note=f"simulated; {result.requests} requests on {result.devices} devices",
    )
    return line_plot(plot)
