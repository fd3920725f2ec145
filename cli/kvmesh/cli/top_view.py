"""What `kvmesh top` looks like. Only renders; every number comes from a MeshView."""

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import ConsoleDimensions, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvmesh.cli.render import milliseconds, size
from kvmesh.integration.top import Latency, MeshView, Served, ShardRow, WorkerRow

UNKNOWN = "-"
LEVELS = " ▁▂▃▄▅▆▇█"
BAR_CELLS = 12
NOBODY_SERVED = Served("measured", None, None)
NARROW = 100  # columns; below, what matters least is left out


def render(
    view: MeshView | None, speeds: Sequence[float], screen: ConsoleDimensions, trouble: str
) -> RenderableType:
    """One frame. trouble: why this look failed; the last one that did not is shown below it."""
    parts: list[RenderableType] = []
    if trouble:
        parts.append(Panel(Text(trouble), title="the mesh does not answer", border_style="red"))
    if view is not None:
        head, summary, *rest = tables(view, screen.width)
        parts += [head, summary, _history(speeds, screen.width), *rest]
    footer = Text("Ctrl-C ends it", style="dim")
    return Group(*parts, footer)


def tables(view: MeshView, width: int) -> list[RenderableType]:
    """The parts of one frame, from the top."""
    parts: list[RenderableType] = [_head(view, width), _summary(view, width)]
    parts += [Text("\nworkers", "bold underline"), _workers(view.workers, width)]
    if view.shards:
        parts += [Text("\nkv cache shards", "bold underline"), _shards(view.shards, width)]
    parts.append(_notes(view))
    return parts


def _head(view: MeshView, width: int) -> RenderableType:
    busy = f"{view.requests_active} active, {view.waiting} waiting, {view.requests_total} in all"
    text = Text.assemble(("kvmesh", "bold"), f"  up {duration(view.uptime_s)}  requests: {busy}")
    for count, word in ((view.rejected_total, "rejected"), (view.migrations_total, "migrations")):
        if count:
            text.append(f", {count} {word}", "yellow")
    text.truncate(max(width, 40), overflow="ellipsis")
    return text


def _summary(view: MeshView, width: int) -> RenderableType:
    prefill = [">prefill/s"] if width >= NARROW else []
    columns = ["", ">req/s", ">tokens/s", *prefill, ">TTFT p50", ">p99", ">TPOT p50", ">p99"]
    table = _table([*columns, ">hits", ">$/Mtok"])
    speeds = [number(view.requests_per_s, 1), number(view.output_tokens_per_s)]
    speeds += [number(view.prefill_tokens_per_s)] if prefill else []
    for index, served in enumerate(view.served or (NOBODY_SERVED,)):
        measured = served.clock == "measured"
        name = Text("mesh" if measured else served.clock, "bold" if measured else "bold magenta")
        latencies = (*_latency(served.ttft), *_latency(served.tpot))
        # What is of the whole mesh stands in the first row only.
        before = speeds if index == 0 else [""] * len(speeds)
        hits = percent(view.hit_rate) if index == 0 else ""
        price = served.usd_per_million_tokens
        dollars = UNKNOWN if price is None else f"{price:.4g}"
        table.add_row(name, *before, *latencies, hits, dollars)
    return table


def _workers(workers: Sequence[WorkerRow], width: int) -> RenderableType:
    wide = width >= NARROW
    columns = ["worker", "role", "state", ">run", ">wait", ">batch", ">tokens/s", ">prefill/s"]
    columns += ["kv pool", *(["device", ">preempted", ">corrupt"] if wide else [])]
    table = _table(columns)
    for row in workers:
        cells: list[Text | str] = [
            Text(row.member_id, "bold"),
            row.role,
            _state(row.state),
            str(row.running),
            Text(str(row.waiting), "yellow" if row.waiting else ""),
            number(row.batch, 1),
            number(row.output_tokens_per_s),
            number(row.prefill_tokens_per_s),
            _bar(row.blocks_used, row.blocks_total, f"{row.blocks_used}/{row.blocks_total}"),
        ]
        if wide:
            device = row.device + (" (simulated)" if row.simulated else "")
            cells += [device, number(row.preemptions), _bad(row.checksum_failures)]
        table.add_row(*cells)
    return table


def _shards(shards: Sequence[ShardRow], width: int) -> RenderableType:
    wide = width >= NARROW
    columns = ["shard", "state", ">blocks", "bytes", ">hit rate", ">in/s", ">out/s"]
    columns += [">evicted", ">corrupt"] if wide else []
    table = _table(columns)
    for row in shards:
        held = UNKNOWN if row.bytes_used is None else size(row.bytes_used)
        cells: list[Text | str] = [
            Text(row.member_id, "bold"),
            _state(row.state),
            number(row.blocks),
            _bar(row.bytes_used or 0, row.bytes_budget or 0, held),
            percent(row.hit_rate),
            UNKNOWN if row.in_bytes_per_s is None else size(row.in_bytes_per_s),
            UNKNOWN if row.out_bytes_per_s is None else size(row.out_bytes_per_s),
        ]
        if wide:
            cells += [number(row.evictions), _bad(row.checksum_failures)]
        table.add_row(*cells)
    return table


def _notes(view: MeshView) -> RenderableType:
    text = f"rates of {view.rate_s:.0f} s, latencies and hit rates of {view.window_s:.0f} s"
    if view.unread:
        text += f"; no metrics of {', '.join(view.unread)}"
    return Text(text, style="dim")


def _history(speeds: Sequence[float], width: int) -> RenderableType:
    """Tokens/s as bars, the present at the right, the highest as high as a line."""
    shown = speeds[-max(10, width - 30) :]
    highest = max(shown, default=0.0)
    top = len(LEVELS) - 1
    bars = "".join(LEVELS[round(top * speed / highest) if highest else 0] for speed in shown)
    label = f"tokens/s, highest {number(highest)}"
    return Text.assemble((bars, "green"), "  ", (label, "dim"))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def number(value: float | None, digits: int = 0) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def _latency(latency: Latency | None) -> tuple[str, str]:
    if latency is None:
        return UNKNOWN, UNKNOWN
    return milliseconds(latency.p50_s), milliseconds(latency.p99_s)


def _state(state: str) -> Text:
    return Text(state, "green" if state == "serving" else "yellow")


def _bad(count: int | None) -> Text:
    return Text(number(count), "bold red" if count else "")


def _bar(used: float, total: float, label: str) -> Text:
    """A gauge with its label; green, then yellow from 70 %, red from 90 %."""
    share = min(1.0, used / total) if total else 0.0
    filled = round(share * BAR_CELLS)
    style = "red" if share >= 0.9 else "yellow" if share >= 0.7 else "green"
    return Text.assemble(("█" * filled, style), ("░" * (BAR_CELLS - filled), "dim"), f" {label}")


def _table(columns: Iterable[str]) -> Table:
    """Columns whose name starts with '>' are numbers, set to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim", collapse_padding=True)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=True)
    return table
