"""`kvmesh simulate`: a mesh in virtual time. Everything it shows is simulated."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from kvmesh.cli.devices import Folder
from kvmesh.cli.errors import FAILED, USAGE, CommandFailed
from kvmesh.cli.load import Arrivals, Goals, Lengths, limits_of, load_of
from kvmesh.cli.options import Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json
from kvmesh.cli.simulate_view import show_found, show_result

if TYPE_CHECKING:
    from kvmesh.integration.serve_report import Limits
    from kvmesh.integration.simulate import Result, Scenario, WorkerPool
    from kvmesh.integration.simulate.search import Found
    from kvmesh.integration.simulate.source import Source


@dataclass(frozen=True)
class Mesh:
    """What is simulated."""

    model: Annotated[str, Option(help="A model's name or config.json.")] = "llama-3.1-8b"
    device: Annotated[str, Option(help="A device's name or file (kvmesh devices list).")] = "h100"
    workers: Annotated[
        str | None,
        Option(help="Workers that do both phases, as in 16xtp4 (default: 1).", show_default=False),
    ] = None
    prefill: Annotated[
        str | None, Option(help="Workers for prompts, as in 4xdep2.", show_default=False)
    ] = None
    decode: Annotated[
        str | None, Option(help="Workers that go on from there, as in 4xdep16.", show_default=False)
    ] = None
    weights: Annotated[
        str | None, Option(help="Format of the weights (default: the device's smallest).")
    ] = None
    slots: Annotated[int, Option(help="Sequences that run at once on an attention rank.")] = 256
    step_tokens: Annotated[int, Option(help="Most tokens of a rank's step.")] = 8192
    prefill_chunk: Annotated[
        int | None,
        Option(
            help="Most prompt tokens of a step in which others decode (default: all).",
            show_default=False,
        ),
    ] = None
    link: Annotated[
        str | None,
        Option(help="What K and V are handed over by: scale-up or scale-out.", show_default=False),
    ] = None
    transfer_gbs: Annotated[
        float | None, Option(help="Instead, GB/s of each device.", show_default=False)
    ] = None
    fail: Annotated[
        list[str] | None,
        Option(help="worker@seconds[+seconds]: dies, and is back after.", show_default=False),
    ] = None


@dataclass(frozen=True)
class Switches:
    """What is switched on."""

    kv: Annotated[str, Option(help="Format of the KV cache: fp8, fp16 or a codec.")] = "fp8"
    fused: Annotated[bool, Option(help="Small kernels are joined.")] = True
    balance: Annotated[bool, Option(help="Attention ranks share requests out by load.")] = True
    expert_balance: Annotated[bool, Option(help="Experts are placed by load.")] = True
    drafts: Annotated[
        int, Option(min=0, max=3, help="Multi-token prediction: drafts per step.")
    ] = 0
    acceptance: Annotated[
        str | None,
        Option(
            help="Chance of each draft, comma-separated (default: measured, .79,.61,.46).",
            show_default=False,
        ),
    ] = None
    policy: Annotated[str, Option(help="kv-aware, least-loaded, round-robin or random.")] = (
        "kv-aware"
    )


Named = Annotated[
    str | None,
    Option(
        "--workload",
        help="A workload's name or file, with --rate (see kvmesh plan).",
        show_default=False,
    ),
]
Plot = Annotated[Path | None, Option(help="Write queues over time, SVG.", show_default=False)]
MinSeconds = Annotated[
    float, Option(min=0, help="With --find-max-qps: arrivals last at least so long (MLPerf: 600).")
]
FindMax = Annotated[
    bool, Option("--find-max-qps", help="The most requests/s that keep the limits at p99.")
]


@command
def simulate(
    mesh: Mesh,
    switches: Switches,
    arrivals: Arrivals,
    lengths: Lengths,
    goals: Goals,
    workload: Named = None,
    find_max_qps: FindMax = False,
    min_seconds: MinSeconds = 60.0,
    folder: Folder = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Simulate a mesh under a load: the live router's and schedulers' decisions in virtual time.

    Exit code 1 if a limit was given and not kept, or a request did not finish.
    """
    from kvmesh.integration.simulate import simulate as run
    from kvmesh.integration.simulate.report import result_record, scenario_record, verdict_record
    from kvmesh.integration.simulate.verdict import judge

    scenario = scenario_of(mesh, switches, folder)
    least = min_seconds if find_max_qps else None
    source = source_of(scenario, (arrivals, lengths), workload, least)
    limits = limits_of(goals) if any(asdict(goals).values()) else source.limits
    if find_max_qps:
        found = search(scenario, source, limits, lengths.seed, hidden=json)
        show_found(scenario, found, limits, json)
        return
    load = source.load()
    begin, cpu = time.perf_counter(), time.process_time()
    result = run(scenario, load, lengths.seed)
    speed = _speed(result, time.perf_counter() - begin, time.process_time() - cpu)
    verdict = judge(result, limits)
    if plot is not None:
        _draw(result, scenario, plot)
    if json:
        print_json(
            {
                "simulated": True,
                "scenario": scenario_record(scenario),
                "limits": asdict(limits),
                "result": result_record(result, limits),
                "verdict": verdict_record(verdict),
                "speed": speed,
            }
        )
    else:
        show_result(scenario, result, limits)
        console().print(
            f"{speed['simulated_s_per_s']:,.0f} simulated seconds per second, "
            f"{speed['wall_s']:.2f} s in all",
            markup=False,
        )
    if not verdict.met:
        raise CommandFailed(f"not kept (simulated): {verdict.binding}", FAILED)


def scenario_of(mesh: Mesh, switches: Switches, folder: Path | None) -> "Scenario":
    """Raises ScenarioError, DeviceError or ShapeError naming the field and its limit."""
    from kvmesh.backends.architectures import load_shape
    from kvmesh.backends.devices import load_device
    from kvmesh.integration.planning.choice import default_weights
    from kvmesh.integration.simulate import Optimisations, Scenario
    from kvmesh.integration.simulate.layout import read_failure

    device = load_device(mesh.device, folder)
    weights = mesh.weights or default_weights(device)
    return Scenario(
        load_shape(mesh.model),
        device,
        _pools(mesh),
        Optimisations(
            switches.kv,
            switches.fused,
            switches.balance,
            switches.expert_balance,
            _acceptance(switches),
            switches.policy,
        ),
        weights,
        "fp8" if weights in ("nvfp4", "mxfp4") and "fp8" in device.peak else None,
        mesh.link,
        None if mesh.transfer_gbs is None else mesh.transfer_gbs * 1e9,
        failures=tuple(read_failure(text) for text in mesh.fail or ()),
    )


def _pools(mesh: Mesh) -> "tuple[WorkerPool, ...]":
    from kvmesh.integration.simulate import WorkerPool
    from kvmesh.integration.simulate.layout import read_pool

    like = WorkerPool(
        slots=mesh.slots, step_tokens=mesh.step_tokens, prefill_chunk=mesh.prefill_chunk
    )
    if bool(mesh.prefill) != bool(mesh.decode):
        raise CommandFailed("--prefill and --decode go together; give both, or --workers", USAGE)
    if mesh.prefill and mesh.decode:
        pools = [read_pool(mesh.prefill, "prefill", like), read_pool(mesh.decode, "decode", like)]
        more = [read_pool(mesh.workers, "both", like)] if mesh.workers else []
        return (*pools, *more)
    return (read_pool(mesh.workers or "1", "both", like),)


def _acceptance(switches: Switches) -> tuple[float, ...]:
    from kvmesh.integration.planning.choice import ACCEPTANCE

    if switches.acceptance is None:
        return ACCEPTANCE[: switches.drafts]
    try:
        return tuple(float(part) for part in switches.acceptance.split(","))
    except ValueError as error:
        raise CommandFailed(f"--acceptance: {error}; write as in .79,.61,.46", USAGE) from error


def source_of(
    scenario: "Scenario",
    load: tuple[Arrivals, Lengths],
    workload: str | None,
    min_seconds: float | None = None,
) -> "Source":
    """min_seconds: the load is asked for at other rates than its own, each for so long at least."""
    from kvmesh.integration.simulate import ClosedLoop
    from kvmesh.integration.simulate.source import Amount, from_named, from_shape, from_workload
    from kvmesh.integration.workload import Shape

    arrivals, lengths = load
    rated = arrivals.rate is not None or workload is not None or min_seconds is not None
    if rated and arrivals.concurrency is not None:
        raise CommandFailed(
            "--concurrency is a closed loop; --rate, --workload and --find-max-qps are open ones; "
            "give one of them",
            USAGE,
        )
    context = scenario.model.max_context
    rate = arrivals.rate or (None if min_seconds is None else 1.0)
    amount = Amount(arrivals.requests or 1000, min_seconds or 0.0)
    if workload is not None:
        if arrivals.trace is not None:
            raise CommandFailed("give --workload or --trace, not both", USAGE)
        return from_named(workload, rate, amount, lengths.seed, context)
    if arrivals.trace is None and rate is not None:
        shape = Shape(
            lengths.prompt_tokens, lengths.output_tokens, lengths.shared_tokens, lengths.prefixes
        )
        return from_shape(shape, rate, amount, lengths.seed, context)
    closed = arrivals.trace is None or arrivals.concurrency is not None
    loop = ClosedLoop(arrivals.concurrency or 8) if closed else None
    return from_workload(load_of(arrivals, lengths), context, loop)


def search(
    scenario: "Scenario", source: "Source", limits: "Limits", seed: int, hidden: bool
) -> "Found":
    from kvmesh.integration.simulate.search import Search, find_max_qps

    start = float(scenario.devices)
    with progress_bar("rates tried", 16, hidden) as advance:
        return find_max_qps(
            Search(scenario, source.at, limits, seed, start), lambda trial: advance()
        )


def _speed(result: "Result", wall_s: float, cpu_s: float) -> dict[str, float]:
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "simulated_s_per_s": result.seconds / wall_s,
        "requests_per_s": result.requests / wall_s,
    }


def _draw(result: "Result", scenario: "Scenario", path: Path) -> None:
    from kvmesh.integration.simulate.report import queue_plot

    title = f"{scenario.model.name} on {scenario.devices} {result.pools[0].device} (simulated)"
    try:
        path.write_text(queue_plot(result, title), encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"cannot write {path}: {error.strerror}", USAGE) from error
