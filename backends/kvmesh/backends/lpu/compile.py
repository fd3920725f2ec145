"""Compiles a model for a number of chips, runs what it compiled, and says what takes the time."""

from collections import defaultdict
from dataclasses import dataclass

from kvmesh.backends.devices import load_device
from kvmesh.backends.lpu.chip import LpuChip
from kvmesh.backends.lpu.execute import Execution, Executor
from kvmesh.backends.lpu.lower import Lowering, Work
from kvmesh.backends.lpu.operations import Operations
from kvmesh.backends.lpu.program import LpuError, Program
from kvmesh.backends.lpu.schedule import Schedule
from kvmesh.backends.lpu.shapes import ModelShape, Placement, place_model
from kvmesh.kernels.layout import CODECS

DEVICE = load_device("lpu-v1")
CHIP = LpuChip.of(DEVICE)
_WHOLE_WEIGHTS = 16 << 20  # a model up to this size is one program, not one layer times many


@dataclass(frozen=True, slots=True)
class Part:
    """One program of one chip of a group, checked by running it. times: how often per token."""

    name: str
    program: Program
    execution: Execution
    times: int

    @property
    def cycles(self) -> int:
        return self.execution.cycles * self.times


@dataclass(frozen=True, slots=True)
class Compiled:
    """A model on chips, for `tokens` new tokens of one sequence with `context` before them."""

    placement: Placement
    codec: str
    context: int
    tokens: int
    parts: tuple[Part, ...]

    @property
    def cycles(self) -> int:
        """From the token that goes in to the one that comes out; stages run one after another."""
        return sum(part.cycles for part in self.parts)

    @property
    def seconds(self) -> float:
        """Simulated."""
        return self.cycles / CHIP.clock_hz

    @property
    def whole(self) -> bool:
        """One program holds all layers; else one layer stands for all."""
        return len(self.parts) == 1

    def utilisation(self) -> dict[str, float]:
        """Kind of slice -> share of its ports' cycles in which they work, on a chip that is at
        work; ports that a program never uses count."""
        busy: dict[str, float] = defaultdict(float)
        for part in self.parts:
            for port, cycles in part.execution.busy.items():
                busy[_kind(port)] += cycles * part.times
        return {kind: busy[kind] / (count * self.cycles) for kind, count in _PORTS.items()}


_PORTS = {
    "MEM read": CHIP.mem_slices,
    "MEM write": CHIP.mem_slices,
    "VXM ALU": CHIP.vxm_alus,
    "MXM weights": 2,
    "MXM compute": 2,
    "SXM": 2,
    "C2C send": CHIP.local_links,
}


def _kind(port: str) -> str:
    unit, _, name = port.partition(".")
    kind = unit.partition("_")[0]
    ends = {"load": "weights", "compute": "compute", "read": "read", "write": "write"}
    if kind == "C2C":
        return "C2C send" if name.startswith("send") else "C2C receive"
    return {"VXM": "VXM ALU", "SXM": "SXM"}.get(kind) or f"{kind} {ends[name]}"


def check_request(shape: ModelShape, codec: str, context: int | None) -> int:
    """The context in tokens; None is the model's longest, at most 4096. Raises LpuError."""
    if codec not in CODECS:
        raise LpuError(f"codec is {codec!r}, must be one of {', '.join(CODECS)}")
    context = min(shape.max_context, 4096) if context is None else context
    if not 1 <= context <= shape.max_context:
        raise LpuError(f"context is {context} tokens, {shape.name} takes 1 to {shape.max_context}")
    return context


def compile_model(
    shape: ModelShape,
    chips: int | None = None,
    codec: str = "fp16",
    context: int | None = None,
    tokens: int = 1,
    whole: bool = True,
) -> Compiled:
    """Places, schedules and runs. chips: None takes as few as hold it. context: None is the
    model's longest, at most 4096 tokens. whole: a small model is one program.

    Raises LpuError for bad input: ModelDoesNotFit, or a codec or context that does not exist.
    """
    context = check_request(shape, codec, context)
    placement = place_model(shape, chips, codec, context, CHIP)
    room = CHIP.room_to_work(placement.weight_bytes + placement.kv_bytes)
    work = Work(shape, placement.group, codec, context, tokens)
    parts: tuple[Part, ...]
    if whole and placement.stages == 1 and shape.weights <= _WHOLE_WEIGHTS:
        parts = (_part("token", (work, room), ("layer",) * shape.num_layers + ("head",), 1),)
    else:
        parts = (
            _part("layer", (work, room), ("layer",), shape.num_layers),
            _part("head", (work, room), ("head",), 1),
        )
        if placement.stages > 1:  # and from the last stage back to the first
            parts += (_part("handoff", (work, room), ("handoff",), placement.stages),)
    return Compiled(placement, codec, context, tokens, parts)


def compile_ffn(shape: ModelShape, group: int, tokens: int) -> Part:
    """One layer's FFN on a group of chips, for a model whose other parts are elsewhere."""
    room = CHIP.room_to_work(3 * shape.hidden * -(-shape.ffn // group))
    return _part("ffn", (Work(shape, group, "fp16", 1, tokens), room), ("ffn",), shape.num_layers)


def _part(name: str, work: tuple[Work, int], steps: tuple[str, ...], times: int) -> Part:
    """work: and the vectors of each work slice that are free for it."""
    schedule = Schedule(CHIP, work[1])
    lowering = Lowering(Operations(schedule), work[0])
    x = lowering.input()
    for step in steps:
        x = getattr(lowering, step)(x)
    program = schedule.program()
    return Part(name, program, Executor(CHIP, [program]).run(), times)
