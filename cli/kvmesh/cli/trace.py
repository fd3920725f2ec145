"""`kvmesh trace`: the stored spans of a mesh's requests, as lists and waterfalls.

Works without a running mesh: the spans are files of the run directory.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.errors import CommandFailed
from kvmesh.cli.options import Json, RunDir, command
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.text import Text

    from kvmesh.integration.traces import Row, Span

app = typer.Typer(no_args_is_help=True, help="Look at the traces of requests.")

Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest so many.")]
Every = Annotated[bool, typer.Option("--all", help="Also probes and other work of the mesh.")]
TraceId = Annotated[str, typer.Argument(metavar="[ID]", help="A trace id, its start, or 'last'.")]
Attributes = Annotated[
    bool, typer.Option("--attributes", "-a", help="Show each span's attributes and events.")
]

# One colour per service, the same in every trace.
COLOURS = {
    "kvmesh-router": "cyan",
    "kvmesh-tokenizer": "magenta",
    "kvmesh-worker": "green",
    "kvmesh-kvcache": "yellow",
}
NAME_WIDTH = 28
MIN_BAR = 12
MAX_WIDTH = 130  # a line that is longer is hard to follow with the eye


@command
def list_traces(
    run_dir: RunDir = None, limit: Limit = 20, every: Every = False, json: Json = False
) -> None:
    """List the newest requests."""
    from datetime import datetime

    from kvmesh.integration.traces import summarize

    traces = summarize(_spans(run_dir))
    found = [trace for trace in traces if every or trace.is_request][:limit]
    if json:
        print_json([asdict(summary) for summary in found])
        return
    print_table(
        "",
        ("trace", "started", "request", ">duration", ">spans", "members", ">errors"),
        [
            (
                trace.trace_id,
                datetime.fromtimestamp(trace.start_ns / 1e9).strftime("%d.%m. %H:%M:%S"),
                trace.name,
                f"{trace.duration_ms:.1f} ms",
                trace.num_spans,
                ", ".join(trace.members),
                trace.errors or "",
            )
            for trace in found
        ],
    )


@command
def show(
    trace_id: TraceId = "last",
    run_dir: RunDir = None,
    attributes: Attributes = False,
    json: Json = False,
) -> None:
    """Show one trace as a waterfall."""
    from kvmesh.integration.traces import find_trace, waterfall

    try:
        rows = waterfall(find_trace(_spans(run_dir), trace_id))
    except LookupError as error:
        raise CommandFailed(f"{error.args[0]}; 'kvmesh trace list' shows what there is") from None
    if json:
        print_json([asdict(row) for row in rows])
        return
    print_waterfall(rows, attributes)


def _spans(run_dir: "Path | None") -> "list[Span]":
    from kvmesh.integration.launch_state import resolve_run_dir, spans_dir
    from kvmesh.integration.traces import load_spans

    folder = spans_dir(resolve_run_dir(run_dir))
    spans = load_spans(folder)
    if not spans:
        raise CommandFailed(
            f"no spans in {folder}; send a request first, and look at the OTLP back end instead "
            "if OTEL_EXPORTER_OTLP_ENDPOINT was set"
        )
    return spans


def print_waterfall(rows: "Sequence[Row]", attributes: bool = False) -> None:
    """One line per span: name by depth, member, start and length in ms, a bar, its events."""
    from rich.text import Text

    from kvmesh.integration.traces import total_ms

    out = console()
    total = total_ms(rows)
    width = max(MIN_BAR, min(out.width, MAX_WIDTH) - NAME_WIDTH - 44)
    head = f"trace {rows[0].span.trace_id}, {len(rows)} spans, {total:.1f} ms"
    out.print(Text(head, style="bold"))
    for row in rows:
        out.print(_line(row, total, width), no_wrap=True, overflow="crop", crop=True)
        if attributes:
            out.print(Text(_details(row), style="dim"), soft_wrap=True)


def _line(row: "Row", total: float, width: int) -> "Text":
    from rich.text import Text

    from kvmesh.integration.traces import bar

    span = row.span
    colour = COLOURS.get(span.service, "white")
    name = "  " * row.depth + ("? " if row.detached else "") + span.name
    begin, length = bar(row, total, width)
    failed = span.status == "ERROR"
    line = Text(f"{name[: NAME_WIDTH - 1]:<{NAME_WIDTH}}", style="bold red" if failed else colour)
    line.append(f"{span.member[:11]:<12}{row.offset_ms:>9.1f}{row.duration_ms:>9.1f} ms ")
    line.append(" " * begin + "█" * length, style=colour)
    if span.events:
        line.append(f" {len(span.events)} event{'s'[: len(span.events) > 1]}", style="dim")
    if span.attributes.get("kvmesh.clock") == "simulated":
        line.append(" simulated", style="yellow")
    if failed:
        line.append(f" {span.status_message}", style="red")
    return line


def _details(row: "Row") -> str:
    pad = "  " * row.depth + "    "
    origin = row.span.start_ns - row.offset_ms * 1e6
    lines = [f"{pad}{key} = {value}" for key, value in sorted(row.span.attributes.items())]
    for event in row.span.events:
        at = (event["time_ns"] - origin) / 1e6
        lines.append(f"{pad}at {at:.1f} ms: {event['name']} {event['attributes'] or ''}".rstrip())
    return "\n".join(lines)


app.command("list")(list_traces)
app.command("show")(show)
