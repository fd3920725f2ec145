"""`kvmesh lpu`: what a model's static schedule on simulated LPU chips looks like and costs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.options import Json, command
from kvmesh.cli.render import console, print_json, print_table, size

if TYPE_CHECKING:
    from kvmesh.backends.lpu.compile import Compiled
    from kvmesh.backends.lpu.critical import Leg

app = typer.Typer(no_args_is_help=True, help="Compile models for the LPU, simulated by cycles.")

_PATH_ROWS = 10

ModelName = Annotated[
    str | None,
    typer.Argument(
        help="A checkpoint's folder, or a name such as llama-2-70b (default: the bundled mini).",
        show_default=False,
    ),
]
Chips = Annotated[
    int | None, typer.Option(help="Chips (default: as few as hold it).", show_default=False)
]
Codec = Annotated[str, typer.Option(help="How K and V lie in memory.")]
Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens that the new one attends to (default: the longest, at most 4096).",
        show_default=False,
    ),
]
Gantt = Annotated[Path | None, typer.Option(help="Write a Gantt chart, SVG.", show_default=False)]
Trace = Annotated[
    Path | None, typer.Option(help="Write a trace for ui.perfetto.dev.", show_default=False)
]


@app.callback()
def _group() -> None:
    pass


def compile_command(
    path: ModelName = None,
    chips: Chips = None,
    codec: Codec = "k4v4",
    context: Context = None,
    gantt: Gantt = None,
    trace: Trace = None,
    json: Json = False,
) -> None:
    """Schedule one token of a model on LPU chips, run it cycle by cycle, show what takes time."""
    from kvmesh.backends.lpu.compile import compile_model
    from kvmesh.backends.lpu.critical import by_label, critical_path
    from kvmesh.backends.lpu.pictures import gantt_svg, perfetto_trace
    from kvmesh.backends.lpu.shapes import find_shape

    shape = find_shape(path or str(_bundled()))
    with console(stderr=True).status("compiling, then running every cycle"):
        compiled = compile_model(shape, chips, codec, context)
    first = compiled.parts[0]
    legs = critical_path(first.program, first.execution.cycles)
    if gantt is not None:
        title = f"{shape.name}: one {first.name} on one LPU chip of a group of "
        title += f"{compiled.placement.group}, {compiled.context} tokens of {codec} (simulated)"
        gantt.write_text(gantt_svg(first, title), encoding="utf-8")
    if trace is not None:
        trace.write_text(perfetto_trace(compiled), encoding="utf-8")
    path_rows = by_label(legs)
    if json:
        print_json(_plain(compiled, path_rows, legs))
        return
    _show(compiled, path_rows)
    for what, written in (("Gantt chart", gantt), ("trace for ui.perfetto.dev", trace)):
        if written is not None:
            console().print(f"{what}: {written}")


@command
def roofline(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder or a known name.")],
    chips: Chips = None,
    codec: Codec = "k4v4",
    context: Context = None,
    json: Json = False,
) -> None:
    """A bound for Groq 3 (LP30) from its data sheet: no instruction set of it is public."""
    from dataclasses import asdict

    from kvmesh.backends.lpu.compile import check_request
    from kvmesh.backends.lpu.roofline import lp30_roofline
    from kvmesh.backends.lpu.shapes import find_shape

    shape = find_shape(model)
    tokens = check_request(shape, codec, context)
    bound = lp30_roofline(shape, codec, tokens, chips)
    if json:
        found = {"simulated": True, "level": "roofline and links", "chip": "LP30"}
        print_json({**found, "context": tokens, **asdict(bound), "seconds": bound.seconds})
        return
    console().print(
        f"{shape.name} on {bound.chips} LP30, {tokens} tokens of {codec}: at least "
        f"{bound.seconds * 1e6:,.1f} µs per token (simulated; roofline and links only)"
    )
    print_table(
        "",
        ("bound", ">µs"),
        [
            (name, f"{seconds * 1e6:,.1f}")
            for name, seconds in (
                ("SRAM", bound.memory_s),
                ("arithmetic", bound.compute_s),
                ("links", bound.links_s),
            )
        ],
    )


app.command("compile")(command(compile_command))
app.command("roofline")(roofline)


def _bundled() -> Path:
    from kvmesh.services.common.checkpoint import checkpoint_path
    from kvmesh.services.common.config import MeshConfig

    return checkpoint_path(MeshConfig().model)


def _plain(
    compiled: "Compiled", path_rows: list[tuple[str, str, int]], legs: "tuple[Leg, ...]"
) -> dict[str, Any]:
    place = compiled.placement
    return {
        "simulated": True,
        "model": place.shape.name,
        "chips": place.chips,
        "chips_per_stage": place.group,
        "stages": place.stages,
        "layers_per_stage": place.layers_per_stage,
        "weight_bytes_per_chip": place.weight_bytes,
        "kv_bytes_per_chip_and_sequence": place.kv_bytes,
        "codec": compiled.codec,
        "context": compiled.context,
        "cycles_per_token": compiled.cycles,
        "seconds_per_token": compiled.seconds,
        "tokens_per_second_per_user": 1 / compiled.seconds,
        "compiled_whole": compiled.whole,
        "parts": [
            {
                "name": part.name,
                "times": part.times,
                "cycles": part.execution.cycles,
                "instructions": len(part.program.instructions),
            }
            for part in compiled.parts
        ],
        "utilisation": compiled.utilisation(),
        "critical_path": [
            {"operation": label, "unit": unit, "cycles": cycles}
            for label, unit, cycles in path_rows
        ],
        "critical_path_legs": len(legs),
    }


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _show(compiled: "Compiled", path_rows: list[tuple[str, str, int]]) -> None:
    place, first = compiled.placement, compiled.parts[0]
    out = console()
    idle = place.chips - place.stages * place.group
    out.print(
        f"[bold]{place.shape.name}[/bold] on {_plural(place.chips, 'LPU chip')} (simulated): "
        f"{_plural(place.stages, 'stage')} of {_plural(place.group, 'chip')}, at most "
        f"{_plural(place.layers_per_stage, 'layer')} each"
    )
    if idle:
        out.print(f"{_plural(idle, 'chip')} of these take no part: no layer is left for them")
    out.print(
        f"fullest chip: {size(place.weight_bytes)} of weights, {size(place.kv_bytes)} of "
        f"{compiled.codec} per sequence of {compiled.context} tokens, room for {place.sequences}"
    )
    out.print(
        f"{compiled.cycles:,} cycles per token = {compiled.seconds * 1e6:,.1f} µs, "
        f"{1 / compiled.seconds:,.0f} tokens/s per user (simulated)"
    )
    if not compiled.whole:
        out.print("one program of each kind was compiled and run exactly; the sum is composed")
    print_table(
        "\nprograms of one chip",
        ("program", ">cycles", ">times", ">instructions"),
        [
            (p.name, f"{p.execution.cycles:,}", p.times, f"{len(p.program.instructions):,}")
            for p in compiled.parts
        ],
    )
    print_table(
        "\nutilisation of a chip at work",
        ("slice", ">busy"),
        [(kind, f"{share:.1%}") for kind, share in compiled.utilisation().items()],
    )
    print_table(
        f"\ncritical path of '{first.name}'",
        ("operation", "unit", ">cycles", ">share"),
        [
            (label or "start", unit, f"{cycles:,}", f"{cycles / first.execution.cycles:.1%}")
            for label, unit, cycles in path_rows[:_PATH_ROWS]
        ],
    )
