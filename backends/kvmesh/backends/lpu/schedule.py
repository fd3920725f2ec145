"""Places instructions in time: the first cycle at which every port and stream slot is free.

A flow is a group of instructions whose distances in time are fixed by the hops between them. It is
placed as a whole.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from kvmesh.backends.lpu.chip import EAST, WEST, LpuChip
from kvmesh.backends.lpu.program import (
    CONSTANT,
    Instruction,
    Operand,
    Program,
    Result,
    ScheduleError,
)
from kvmesh.backends.lpu.reserve import Claim, Reservations

SIDES = {"E": EAST, "W": WEST}
WEIGHT_GROUP = 8  # most slices that are read side by side for one load


@dataclass(slots=True)
class Value:
    """`beats` vectors of `width` bytes per lane, the same in the hemispheres that hold it.

    places: side -> (slices, one for each byte of the width; first address). ready: first cycle at
    which a read may start.
    """

    number: int
    beats: int
    width: int
    places: dict[str, tuple[tuple[str, ...], int]]
    ready: int = 0


class Schedule:
    """One chip's program in the making. work_vectors: of each work slice, for values."""

    def __init__(self, chip: LpuChip, work_vectors: int | None = None) -> None:
        self.chip = chip
        self.instructions: list[Instruction] = []
        self.image: dict[tuple[str, int], int] = {}
        self.reservations = Reservations()
        self._numbers = 0
        self._values = 0
        self._next_slice = 0
        self._base = chip.slice_vectors - (work_vectors or chip.slice_vectors)
        self._work: dict[str, int] = defaultdict(lambda: self._base)  # slice -> next vector
        self._data: dict[str, int] = defaultdict(int)  # slice -> vectors of weights and cache

    def program(self) -> Program:
        ordered = sorted(self.instructions, key=lambda each: each.number)
        return Program(tuple(ordered), dict(self.image))

    def number(self) -> int:
        self._numbers += 1
        return self._numbers - 1

    def allocate(self, beats: int, width: int, sides: str = "EW") -> Value:
        """Room for a value. Slices are taken in turn, and used again from the start when full."""
        if beats > self.chip.slice_vectors - self._base:
            raise ScheduleError(
                f"a value of {beats} vectors is over the {self.chip.slice_vectors - self._base} "
                "that a slice has for it"
            )
        slices = [(self._next_slice + i) % self.chip.work_slices for i in range(width)]
        self._next_slice += width
        places = {}
        for side in sides:
            names = tuple(f"MEM_{side}{i}" for i in slices)
            address = max(self._work[name] for name in names)
            if address + beats > self.chip.slice_vectors:
                address = self._base
            for name in names:
                self._work[name] = address + beats
            places[side] = names, address
        self._values += 1
        return Value(self._values, beats, width, places)

    def constant(self, beats: int, width: int) -> Value:
        """A value that lies in memory from the start, such as the token's embedding."""
        value = self.allocate(beats, width)
        value.number = CONSTANT
        for slices, address in value.places.values():
            for name in slices:
                self.image[name, address] = beats
        return value

    def weights(self, side: str, vectors: int, width: int) -> tuple[tuple[str, ...], int]:
        """Where the next `vectors` of weights lie in each of `width` slices side by side."""
        names = [f"MEM_{side}{i}" for i in range(self.chip.hemisphere_slices)]
        work = names[: self.chip.work_slices]
        room = {name: self._base if name in work else self.chip.slice_vectors for name in names}
        free = [name for name in names if self._data[name] + vectors <= room[name]]
        free.sort(key=lambda name: (name in work, self._data[name]))
        chosen = tuple(free[:width])
        address = max((self._data[name] for name in chosen), default=0)
        if len(chosen) < width or any(address + vectors > room[name] for name in chosen):
            raise ScheduleError(f"no {width} slices of side {side} have {vectors} vectors left")
        for name in chosen:
            self._data[name] = address + vectors
            self.image[name, address] = vectors
        return chosen, address


@dataclass(slots=True)
class Flow:
    """Instructions with cycles relative to the flow's own zero, and all that they claim."""

    schedule: Schedule
    drafts: list[Instruction] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    earliest: int = 0  # of its zero, for the values it reads to be there

    def add(self, draft: Instruction) -> Instruction:
        self.drafts.append(draft)
        self.claims += [Claim(port, draft.cycle, draft.end) for port in draft.ports]
        return draft

    def carry(self, source: str, target: str, result: Result, put_at: int) -> int:
        """Claims the stream slots from unit to unit; the cycle at which the first arrives."""
        chip = self.schedule.chip
        begin, end = chip.position(source), chip.position(target)
        if (end - begin) * result.direction <= 0:
            raise ScheduleError(f"a stream from {source} does not lead to {target}")
        middle = chip.position("VXM")
        low, high = min(begin, end), max(begin, end)
        sides = ("W" if low < middle else "") + ("E" if high > middle else "")
        slot = put_at - result.direction * begin
        length = (result.beats - 1) * result.stride + 1
        arrow = ">" if result.direction == EAST else "<"
        self.claims += [
            Claim(f"{arrow}{stream}{side}", slot, slot + length)
            for stream in range(result.stream, result.stream + result.width)
            for side in sides
        ]
        return put_at + high - low

    def read(
        self,
        place: tuple[tuple[str, ...], int],
        unit: str,
        at: int,
        form: Result,
        value: Value | None = None,
        repeat: int = 1,
    ) -> tuple[Operand, ...]:
        """Reads from each slice, to be at `unit` from cycle `at` on. value: None for constants."""
        chip = self.schedule.chip
        operands = []
        slices, address = place
        for i, name in enumerate(slices):
            hops = abs(chip.position(unit) - chip.position(name))
            result = replace(form, stream=form.stream + i, width=1, offset=chip.mem_cycles)
            draft = Instruction(
                number=self.schedule.number(),
                unit=name,
                op="read",
                cycle=at - hops - chip.mem_cycles,
                ports=(f"{name}.read",),
                beats=form.beats,
                stride=form.stride,
                writes=(result,),
                address=address,
                value=value.number if value else CONSTANT,
                repeat=repeat,
            )
            self.add(draft)
            if value is not None:
                self.earliest = max(self.earliest, value.ready - draft.cycle)
            self.carry(name, unit, result, at - hops)
            operands.append(
                Operand(form.direction, form.stream + i, 1, draft.number, form.beats, form.stride)
            )
        return tuple(operands)

    def write(self, producer: Instruction, result: Result, value: Value, offset: int = 0) -> None:
        """Writes of a result that goes out from `producer`, in each hemisphere it passes."""
        chip = self.schedule.chip
        origin = chip.position(producer.unit)
        put_at = producer.cycle + result.offset
        for slices, address in value.places.values():
            if (chip.position(slices[0]) - origin) * result.direction <= 0:
                continue
            for i, name in enumerate(slices):
                one = replace(result, stream=result.stream + i, width=1)
                at = put_at + abs(chip.position(name) - origin)
                operand = Operand(
                    result.direction, one.stream, 1, producer.number, one.beats, one.stride, part=i
                )
                self.add(
                    Instruction(
                        number=self.schedule.number(),
                        unit=name,
                        op="write",
                        cycle=at,
                        ports=(f"{name}.write",),
                        beats=result.beats,
                        stride=result.stride,
                        reads=(operand,),
                        address=address + offset,
                        value=value.number,
                    )
                )
        self._claim_passage(producer.unit, result, value, put_at)

    def _claim_passage(self, unit: str, result: Result, value: Value, put_at: int) -> None:
        """The slots up to the farthest slice that takes the result."""
        position = self.schedule.chip.position
        ahead = [
            name
            for slices, _ in value.places.values()
            for name in slices
            if (position(name) - position(unit)) * result.direction > 0
        ]
        if ahead:
            farthest = max(ahead, key=lambda name: abs(position(name) - position(unit)))
            self.carry(unit, farthest, result, put_at)

    def place(self, ready: int, values: tuple[Value, ...] = ()) -> int:
        """Fixes the flow in time, at or after `ready`, and when its values can be read.

        Returns the cycle of its zero.
        """
        begin = min((draft.cycle for draft in self.drafts), default=0)
        first = max(ready, self.earliest, -begin)
        zero = self.schedule.reservations.place(self.claims, first)
        label = next((draft.label for draft in self.drafts if draft.label), "")
        for draft in self.drafts:
            fixed = replace(draft, cycle=draft.cycle + zero, label=label)
            self.schedule.instructions.append(fixed)
            if fixed.op == "write":
                for value in values:
                    if value.number == fixed.value:
                        value.ready = max(value.ready, fixed.end)
        return zero
