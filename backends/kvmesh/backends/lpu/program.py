"""What a compiled program is made of. Nothing in it waits: every instruction has its cycle."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.backends.errors import BackendError

CONSTANT = -1  # the value number of what lies in memory before the program starts


class LpuError(BackendError):
    """Root of what can go wrong when a model is compiled for the LPU."""


class ModelDoesNotFit(LpuError):
    """The weights and the cache need more chips, or a layer more memory than a node has."""


class ScheduleError(LpuError):
    """An instruction finds no operand, or no free place, in its cycle. There are no stalls."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Taken from streams [stream, stream + width), beat b at cycle + offset + b * stride.

    producer: instruction whose beats these must be, from its beat 0 on. part: which of the
    producer's streams is the first of these.
    """

    direction: int
    stream: int
    width: int
    producer: int
    beats: int = 1
    stride: int = 1
    offset: int = 0
    part: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """Put on streams [stream, stream + width), beat b at cycle + offset + b * stride."""

    direction: int
    stream: int
    width: int
    offset: int
    beats: int = 1
    stride: int = 1


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, repeated `beats` times, `stride` cycles apart.

    unit: where on the chip (see LpuChip.position). ports: what it holds for beats * stride cycles.
    address, value: of MEM alone: first vector in the slice, and which value lies there.
    repeat: a read stays that many beats on each vector.
    source: the load of a compute's weights, or the send of a receive. plane: of MXM alone.
    restart: a compute that does not add to what the accumulators hold.
    """

    number: int
    unit: str
    op: str
    cycle: int
    ports: tuple[str, ...]
    beats: int = 1
    stride: int = 1
    reads: tuple[Operand, ...] = ()
    writes: tuple[Result, ...] = ()
    address: int = 0
    value: int = CONSTANT
    repeat: int = 1
    source: int = -1
    plane: int = 0
    restart: bool = True
    label: str = ""

    @property
    def end(self) -> int:
        """First cycle in which its ports are free again."""
        return self.cycle + self.beats * self.stride

    @property
    def name(self) -> str:
        return f"{self.number} ({self.unit} {self.op}{' ' + self.label if self.label else ''})"


@dataclass(frozen=True, slots=True)
class Program:
    """The instructions of one chip, by number.

    image: (slice, first address) -> vectors that lie there before the start.
    """

    instructions: tuple[Instruction, ...]
    image: Mapping[tuple[str, int], int] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Cycles until every port is free."""
        return max((each.end for each in self.instructions), default=0)
