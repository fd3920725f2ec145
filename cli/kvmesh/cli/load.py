"""Options that say what load is made of and what it must keep; for a mesh and for a simulation."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from kvmesh.cli.errors import USAGE, CommandFailed

if TYPE_CHECKING:
    from kvmesh.integration.serve_report import Limits
    from kvmesh.integration.workload import Workload


@dataclass(frozen=True)
class Arrivals:
    """When requests come: closed loop unless a rate or a trace is given."""

    concurrency: Annotated[
        int | None,
        Option(min=1, help="Closed loop: so many in flight (default: 8).", show_default=False),
    ] = None
    rate: Annotated[
        float | None, Option(min=0.001, help="Poisson: requests per second on average.")
    ] = None
    trace: Annotated[
        Path | None,
        Option(help="Requests of a Mooncake trace, at their times.", dir_okay=False),
    ] = None
    scale: Annotated[float, Option(help="Trace: lengths times this.")] = 1.0
    speed: Annotated[float, Option(help="Trace: that many times as fast.")] = 1.0
    requests: Annotated[
        int | None,
        Option(min=1, help="How many (default: 64, of a trace all).", show_default=False),
    ] = None


@dataclass(frozen=True)
class Lengths:
    """Of requests that come from no trace."""

    prompt_tokens: Annotated[int, Option(min=1, help="Of each prompt.")] = 128
    output_tokens: Annotated[int, Option(min=1, help="Of each output.")] = 64
    shared_tokens: Annotated[
        int, Option(min=0, help="Of each prompt, at its beginning, shared with others.")
    ] = 0
    prefixes: Annotated[int, Option(min=1, help="Different shared beginnings.")] = 1
    seed: Annotated[int, Option(help="Of prompts and arrivals.")] = 1


@dataclass(frozen=True)
class Goals:
    """Milliseconds that a request may take to count for the goodput."""

    ttft_ms: Annotated[float | None, Option(min=0, help="Limit of the time to first token.")] = None
    tpot_ms: Annotated[float | None, Option(min=0, help="Limit of the time per token.")] = None
    itl_ms: Annotated[float | None, Option(min=0, help="Limit of the longest gap.")] = None
    latency_ms: Annotated[float | None, Option(min=0, help="Limit of the whole request.")] = None


def load_of(arrivals: Arrivals, lengths: Lengths) -> "Workload":
    """Raises CommandFailed (2) for what cannot be."""
    from kvmesh.integration.workload import (
        Shape,
        closed_loop_load,
        poisson_load,
        read_trace,
        scaled,
    )

    if arrivals.trace is not None and arrivals.rate is not None:
        raise CommandFailed("--trace has its own arrivals; give --trace or --rate, not both", USAGE)
    if arrivals.rate is not None and arrivals.concurrency is not None:
        raise CommandFailed("--rate is an open loop; give --rate or --concurrency, not both", USAGE)
    try:
        if arrivals.trace is not None:
            with arrivals.trace.open() as lines:
                load = read_trace(lines, arrivals.trace.name, arrivals.requests)
            return scaled(load, arrivals.scale, arrivals.speed)
        shape = Shape(
            lengths.prompt_tokens, lengths.output_tokens, lengths.shared_tokens, lengths.prefixes
        )
        count = arrivals.requests or 64
        if arrivals.rate is not None:
            return poisson_load(shape, arrivals.rate, count, lengths.seed)
        return closed_loop_load(shape, count, lengths.seed)
    except OSError as error:
        raise CommandFailed(f"cannot read {arrivals.trace}: {error.strerror}", USAGE) from error
    except ValueError as error:
        raise CommandFailed(str(error), USAGE) from error


def limits_of(goals: Goals) -> "Limits":
    from kvmesh.integration.serve_report import Limits

    def seconds(milliseconds: float | None) -> float | None:
        return milliseconds / 1000 if milliseconds is not None else None

    return Limits(
        ttft_s=seconds(goals.ttft_ms),
        tpot_s=seconds(goals.tpot_ms),
        itl_s=seconds(goals.itl_ms),
        duration_s=seconds(goals.latency_ms),
    )


def how_it_comes(asked: dict[str, Any]) -> str:
    if asked["trace"] is not None:
        how = f"trace {Path(asked['trace']).name}, scale {asked['scale']:g}"
        if asked["concurrency"] is None:
            return f"{how}, speed {asked['speed']:g}"
        return f"{how}, {asked['concurrency']} in flight"
    if asked["rate"] is not None:
        return f"Poisson, {asked['rate']:g} requests/s"
    return f"closed loop, {asked['concurrency']} in flight"
