"""A schedule to look at: a Gantt chart as SVG, and a trace that ui.perfetto.dev loads.

Both say that their times are simulated.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from html import escape

from kvmesh.backends.lpu.compile import CHIP, Compiled, Part
from kvmesh.backends.lpu.critical import critical_path
from kvmesh.backends.lpu.program import Instruction

_WIDTH, _LEFT, _ROW, _TOP = 1160, 130, 26, 66
_GROUPS = {
    "norm": ("norm", "norm 1", "norm 2"),
    "attention": ("rope", "heads", "q K", "softmax", "p V"),
    "codec": ("rotate q k v", "rotate back", "encode"),
    "projections": ("qkv", "output"),
    "FFN": ("gate", "up", "silu", "down"),
    "sums": ("sum 1", "sum 2", "handoff"),
    "head": ("head", "argmax"),
}
_COLOURS = ("#8a8f98", "#3b82c4", "#8b5fbf", "#2a9d8f", "#e0a030", "#d1495b", "#6b8e23")
_OF = {label: name for name, labels in _GROUPS.items() for label in labels}
_STYLE = (
    ".t{font:12px sans-serif;fill:#222}.s{font:11px sans-serif;fill:#555}.b{fill:#fff}"
    ".g{stroke:#ddd}@media(prefers-color-scheme:dark){.t{fill:#eee}.s{fill:#aaa}.b{fill:#16181d}"
    ".g{stroke:#3a3d44}}"
)


def _row(each: Instruction) -> str:
    """The row of the chart that an instruction is drawn in."""
    kind, _, side = each.unit.partition("_")
    if kind == "MEM":
        return f"MEM {side[0]} {each.op}"
    if kind == "MXM":
        return f"MXM {side} {'weights' if each.op == 'load' else 'compute'}"
    return {"VXM": "VXM", "SXM": "SXM E"}.get(kind) or f"C2C {each.op}"


def gantt_svg(part: Part, title: str) -> str:
    """One program: a row per kind of slice, the critical path on top, cycles to the right."""
    rows: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    legs = critical_path(part.program, part.execution.cycles)
    rows["critical path"] = [(leg.begin, leg.begin + leg.cycles, leg.label) for leg in legs]
    for each in part.program.instructions:
        rows[_row(each)].append((each.cycle, each.end, each.label))
    names = ["critical path", *sorted(name for name in rows if name != "critical path")]
    total = max(1, part.execution.cycles)
    height = _TOP + _ROW * len(names) + 44
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f'<rect class="b" width="{_WIDTH}" height="{height}"/>'
        f'<text class="t" x="12" y="22">{escape(title)}</text>',
        *_legend(),
    ]
    for i, name in enumerate(names):
        y = _TOP + i * _ROW
        out.append(f'<text class="t" x="12" y="{y + 15}">{name}</text>')
        out += _bars(rows[name], y, total)
    out += _axis(total, _TOP + _ROW * len(names))
    return "\n".join([*out, "</svg>\n"])


def _legend() -> list[str]:
    out, x = [], _LEFT
    for name, colour in zip(_GROUPS, _COLOURS, strict=True):
        out.append(f'<rect x="{x}" y="36" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text class="s" x="{x + 16}" y="46">{name}</text>')
        x += 36 + 8 * len(name)
    return out


def _bars(spans: list[tuple[int, int, str]], y: int, total: int) -> list[str]:
    """Neighbours of one group that lie closer than a pixel's half become one bar."""
    scale = (_WIDTH - _LEFT - 20) / total
    merged: list[list[float | str]] = []
    labels = list(_GROUPS)
    open_bars: dict[str, list[float | str]] = {}
    for begin, end, label in sorted(spans):
        group = _OF.get(label, "norm")
        last = open_bars.get(group)
        if last is not None and (begin - float(last[1])) * scale < 0.5:
            last[1] = max(float(last[1]), end)
            continue
        open_bars[group] = [begin, end, group]
        merged.append(open_bars[group])
    return [
        f'<rect x="{_LEFT + float(begin) * scale:.2f}" y="{y + 3}" '
        f'width="{max(0.3, (float(end) - float(begin)) * scale):.2f}" height="{_ROW - 8}" '
        f'fill="{_COLOURS[labels.index(str(group))]}"/>'
        for begin, end, group in merged
    ]


def _axis(total: int, y: int) -> list[str]:
    scale = (_WIDTH - _LEFT - 20) / total
    raw = total / 8
    power = 10 ** (len(str(int(raw))) - 1)
    step = next(int(power * f) for f in (1, 2, 5, 10) if power * f >= raw)
    out = []
    for cycle in range(0, total + 1, max(1, step)):
        x = _LEFT + cycle * scale
        out.append(f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y + 4}"/>')
        micro = cycle / CHIP.clock_hz * 1e6
        out.append(
            f'<text class="s" x="{x:.1f}" y="{y + 18}" text-anchor="middle">{cycle:,}</text>'
        )
        out.append(
            f'<text class="s" x="{x:.1f}" y="{y + 33}" text-anchor="middle">{micro:.1f} µs</text>'
        )
    out.append(f'<text class="s" x="12" y="{y + 18}">cycles</text>')
    out.append(f'<text class="s" x="12" y="{y + 33}">simulated time</text>')
    return out


def perfetto_trace(compiled: Compiled) -> str:
    """Trace-event JSON: a process for each program, and threads: the critical path, and each unit.

    What a unit has under way at once is on threads of its own, since slices of one thread must nest
    and others are dropped on import. Times are simulated microseconds at the chip's clock.
    """
    events: list[dict[str, object]] = []
    for pid, part in enumerate(compiled.parts, 1):
        name = f"{part.name}, simulated, x {part.times} per token"
        events.append(_named("process_name", pid, 0, name))
        threads = _threads(part.program.instructions)
        events.append(_named("thread_name", pid, 1, "critical path"))
        events += [_named("thread_name", pid, tid, row) for tid, (row, _) in enumerate(threads, 2)]
        legs = critical_path(part.program, part.execution.cycles)
        events += [
            _slice(pid, 1, f"{leg.label} ({leg.unit})", (leg.begin, leg.cycles)) for leg in legs
        ]
        events += [
            _slice(
                pid,
                tid,
                f"{each.op} {each.label}".rstrip(),
                (each.cycle, each.end - each.cycle),
            )
            for tid, (_, instructions) in enumerate(threads, 2)
            for each in instructions
        ]
    other = {"clock": "simulated", "hz": CHIP.clock_hz}
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns", "otherData": other})


def _threads(instructions: Iterable[Instruction]) -> list[tuple[str, list[Instruction]]]:
    """(name, instructions that do not overlap) of each thread, as few for each unit as that takes;
    sorted by unit."""
    rows: dict[str, list[list[Instruction]]] = defaultdict(list)
    for each in sorted(instructions, key=lambda each: (each.unit, each.cycle, each.end)):
        free = (row for row in rows[each.unit] if row[-1].end <= each.cycle)
        row = next(free, None)
        if row is None:
            rows[each.unit].append([each])
        else:
            row.append(each)
    return [
        (f"{unit} ({number})" if number > 1 else unit, row)
        for unit, found in rows.items()
        for number, row in enumerate(found, 1)
    ]


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(pid: int, tid: int, name: str, span: tuple[int, int]) -> dict[str, object]:
    micro = 1e6 / CHIP.clock_hz
    begin, cycles = span
    at = round(begin * micro, 6)
    return {
        "ph": "X",
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": at,
        "dur": round(round((begin + cycles) * micro, 6) - at, 6),
        "args": {"cycle": begin, "cycles": cycles},
    }
