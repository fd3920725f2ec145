"""`kvmesh trace`: the stored spans of a mesh's requests, as lists and waterfalls.

Works without a running mesh: the store is a file of the run directory.
"""

import time
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.errors import CommandFailed
from kvmesh.cli.options import Json, RunDir, command
from kvmesh.cli.render import console, print_json, print_table
from kvmesh.cli.trace_ui import ui

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.text import Text

    from kvmesh.services.traces.reader import SpanReader
    from kvmesh.services.traces.tree import Row

app = typer.Typer(no_args_is_help=True, help="Look at the traces of requests.")


class ExportFormat(StrEnum):
    CHROME = "chrome"
    OTLP = "otlp"


Format = Annotated[ExportFormat, typer.Option("--format", "-f", help="What to write it as.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest so many.")]
Tenant = Annotated[str, typer.Option("--tenant", help="Only those of this tenant.")]
Every = Annotated[bool, typer.Option("--all", help="Also probes and other work of the mesh.")]
TraceId = Annotated[str, typer.Argument(metavar="[ID]", help="A trace id, its start, or 'last'.")]
Attributes = Annotated[
    bool, typer.Option("--attributes", "-a", help="Show each span's attributes and events.")
]

Simulated = Annotated[
    bool,
    typer.Option("--simulated", help="By the clocks of the simulated devices, not the wall clock."),
]

# One colour per service, the same in every trace.
COLOURS = {
    "kvmesh-router": "cyan",
    "kvmesh-tokenizer": "magenta",
    "kvmesh-worker": "green",
    "kvmesh-kvcache": "yellow",
}
CLOCK_MARKS = {"simulated": " simulated", "mixed": " partly simulated"}
NAME_WIDTH = 28
MIN_BAR = 12
FINE_MS = 10.0  # a shorter trace is shown to the microsecond
QUIET_S = 0.8  # longer than a span waits to be sent, and to be written
SETTLE_S = 2.0  # a busy mesh sends some all the time
MAX_WIDTH = 130  # a line that is longer is hard to follow with the eye


@command
def list_traces(
    run_dir: RunDir = None,
    limit: Limit = 20,
    tenant: Tenant = "",
    every: Every = False,
    json: Json = False,
) -> None:
    """List the newest requests."""
    from datetime import datetime

    from kvmesh.services.traces.query import Filter

    with _reader(run_dir) as reader:
        found = reader.newest(Filter(requests_only=not every, tenant=tenant), limit)
        _warn_of_losses(reader)
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
                f"{trace.duration_ms:.1f} ms" + CLOCK_MARKS.get(trace.clock, ""),
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
    simulated: Simulated = False,
    attributes: Attributes = False,
    json: Json = False,
) -> None:
    """Show one trace as a waterfall."""
    from kvmesh.services.traces.tree import waterfall

    with _reader(run_dir) as reader:
        _wait_for_spans(reader, run_dir)
        found = _find(reader, trace_id, simulated)
        rows = waterfall(reader.spans(found))
        twins = [each.trace_id for each in reader.linked(found) if each.clock == "simulated"]
    if json:
        print_json([asdict(row) for row in rows])
        return
    print_waterfall(rows, attributes)
    for twin in twins:
        console().print(
            f"by simulated clocks: kvmesh trace show --simulated {twin[:8]}", style="dim"
        )


@command
def export(
    trace_id: TraceId = "last",
    run_dir: RunDir = None,
    format: Format = ExportFormat.CHROME,
    simulated: Simulated = False,
) -> None:
    """Print one trace as JSON: for Perfetto and chrome://tracing, or as OTLP."""
    from kvmesh.services.traces.export import chrome_json, otlp_json

    with _reader(run_dir) as reader:
        _wait_for_spans(reader, run_dir)
        spans = reader.spans(_find(reader, trace_id, simulated))
    print_json(chrome_json(spans) if format is ExportFormat.CHROME else otlp_json(spans))


def _reader(run_dir: "Path | None") -> "SpanReader":
    from kvmesh.integration.launch_state import resolve_run_dir, traces_path
    from kvmesh.services.traces.reader import SpanReader

    path = traces_path(resolve_run_dir(run_dir))
    try:
        return SpanReader(path)
    except FileNotFoundError:
        raise CommandFailed(
            f"no spans: {path} does not exist; send a request to a mesh first, one with "
            'traces = true and, if OTEL_EXPORTER_OTLP_ENDPOINT is set, otlp = "join"'
        ) from None


def settled(read: "Callable[[], float]", quiet_s: float, most_s: float) -> float:
    """What `read` gives when it has given the same for quiet_s, and not 0; after most_s whatever it
    gives."""
    found = read()
    started = changed = time.monotonic()
    while time.monotonic() < min(changed + quiet_s, started + most_s):
        time.sleep(0.1)
        now = read()
        if now != found or not now:
            found, changed = now, time.monotonic()
    return found


def _wait_for_spans(reader: "SpanReader", run_dir: "Path | None") -> None:
    """Members of a mesh send spans a while after a request: until no more come, if one runs."""
    from kvmesh.integration.launch_state import resolve_run_dir, running_state

    if running_state(resolve_run_dir(run_dir)) is not None:
        settled(reader.num_spans, QUIET_S, SETTLE_S)


def _find(reader: "SpanReader", wanted: str, simulated: bool = False) -> str:
    try:
        found = reader.find(wanted)
        return reader.simulated(found) if simulated else found
    except LookupError as error:
        raise CommandFailed(f"{error.args[0]}; 'kvmesh trace list' shows what there is") from None


def _warn_of_losses(reader: "SpanReader") -> None:
    lost = sum(n for name, n in reader.counters().items() if name.startswith("dropped"))
    if lost:
        console(stderr=True).print(f"[yellow]{lost:,} spans were dropped[/yellow]")


def print_waterfall(rows: "Sequence[Row]", attributes: bool = False) -> None:
    """One line per span: name by depth, member, start and length in ms, a bar, its events."""
    from rich.text import Text

    from kvmesh.services.traces.tree import total_ms

    out = console()
    total = total_ms(rows)
    width = max(MIN_BAR, min(out.width, MAX_WIDTH) - NAME_WIDTH - 44)
    digits = 1 if total >= FINE_MS else 3
    head = f"trace {rows[0].span.trace_id}, {len(rows)} spans, {total:.{digits}f} ms"
    head += " (simulated)" if all(row.span.simulated for row in rows) else ""
    out.print(Text(head, style="bold"))
    for row in rows:
        out.print(_line(row, total, width, digits), no_wrap=True, overflow="crop", crop=True)
        if attributes:
            out.print(Text(_details(row), style="dim"), soft_wrap=True)


def _line(row: "Row", total: float, width: int, digits: int) -> "Text":
    from rich.text import Text

    from kvmesh.services.traces.tree import bar

    span = row.span
    colour = COLOURS.get(span.service, "white")
    name = "  " * row.depth + ("? " if row.detached else "") + span.name
    begin, length = bar(row, total, width)
    failed = span.status == "ERROR"
    line = Text(f"{name[: NAME_WIDTH - 1]:<{NAME_WIDTH}}", style="bold red" if failed else colour)
    line.append(f"{span.member[:11]:<12}")
    line.append(f"{row.offset_ms:>9.{digits}f}{row.duration_ms:>9.{digits}f} ms ")
    line.append(" " * begin + "█" * length, style=colour)
    if span.events:
        line.append(f" {len(span.events)} event{'s'[: len(span.events) > 1]}", style="dim")
    if span.simulated:
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
app.command("export")(export)
app.command("ui")(ui)
