"""Runs compiled programs cycle by cycle, and believes nothing that the scheduler believed.

Every stream register is moved by one hop in every cycle; every consumer looks into the registers
at its own place in its own cycle, and fails if what lies there is not its operand.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from kvmesh.backends.lpu.chip import EAST, LpuChip
from kvmesh.backends.lpu.program import (
    CONSTANT,
    Instruction,
    Operand,
    Program,
    Result,
    ScheduleError,
)

_BEATS, _PARTS = 1 << 20, 1 << 6  # limits of a tag's fields
_PART_NUMBERS = np.arange(_PARTS, dtype=np.int64)


def tag(number: int, beat: int, part: int = 0) -> int:
    """Names one vector on one stream: never zero, which is an empty register."""
    return ((number + 1) * _BEATS + beat) * _PARTS + part


class Datapath(Protocol):
    """Carries real numbers along; told of everything that the execution found in order."""

    def take(self, chip: int, instruction: Instruction, operand: int, beat: int) -> None: ...

    def put(self, chip: int, instruction: Instruction, beat: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Execution:
    """cycles: until the last port is free. busy: port -> cycles held, over all chips."""

    cycles: int
    busy: dict[str, int]


@dataclass(slots=True)
class _Chip:
    number: int
    program: Program
    registers: np.ndarray  # int64 [direction (east, west), stream, position]
    memory: dict[str, dict[int, int]]  # slice -> address -> value
    buffers: dict[tuple[str, int], tuple[int, int]]  # MXM and plane -> load, cycle complete
    arrays: dict[tuple[str, int], int]  # MXM and plane -> load
    arrivals: dict[int, set[tuple[int, int]]]  # cycle -> (send, beat)


# Chip, instruction, its operand or result or None at its start, the number of that, and the beat.
_Event = tuple[_Chip, Instruction, Operand | Result | None, int, int]


class Executor:
    """peers: for each program, the number of the one whose sends it receives.

    One program alone stands for a group whose chips all run it in step, each receiving what its
    peers send in the same cycle in which it sends itself.
    """

    def __init__(
        self,
        chip: LpuChip,
        programs: Sequence[Program],
        peers: Sequence[int] | None = None,
        datapath: Datapath | None = None,
    ) -> None:
        self._chip, self._datapath = chip, datapath
        self._peers = tuple(peers or range(len(programs)))
        self._chips = [self._fresh(i, program) for i, program in enumerate(programs)]
        self._units = {each.unit: 0 for p in programs for each in p.instructions}
        self._units = {unit: chip.position(unit) for unit in self._units}
        self._events: dict[int, list[_Event]] = defaultdict(list)  # by cycle

    def run(self) -> Execution:
        """Raises ScheduleError naming instruction, cycle and operand that are not in order."""
        busy: dict[str, int] = defaultdict(int)
        for state in self._chips:
            _check_ports(state.program)
            for each in state.program.instructions:
                if each.cycle < 0:
                    raise ScheduleError(f"instruction {each.name} is before the start")
                for port in each.ports:
                    busy[port] += each.beats
                self._events[each.cycle].append((state, each, None, 0, 0))
        cycle = last = 0
        while self._events:
            for state in self._chips:
                _move(state.registers)
            if cycle in self._events:
                self._cycle(cycle)
                last = cycle
            cycle += 1
        return Execution(max(last + 1, *(s.program.end for s in self._chips)), dict(busy))

    def _fresh(self, number: int, program: Program) -> _Chip:
        shape = (2, self._chip.streams_per_direction, self._chip.positions)
        memory: dict[str, dict[int, int]] = defaultdict(dict)
        for (place, address), vectors in program.image.items():
            if address + vectors > self._chip.slice_vectors:
                raise ScheduleError(f"{place} has no vector {address + vectors - 1}")
            memory[place].update(dict.fromkeys(range(address, address + vectors), CONSTANT))
        registers = np.zeros(shape, np.int64)
        return _Chip(number, program, registers, memory, {}, {}, defaultdict(set))

    def _cycle(self, cycle: int) -> None:
        """Starts, then takes, then puts: a value is seen one hop on, one cycle later."""
        puts: list[_Event] = []
        happening = self._events[cycle]
        for event in happening:  # grows while it is read: what starts now may also take now
            state, instruction, step, index, beat = event
            if step is None:
                self._start(state, instruction, cycle)
            elif isinstance(step, Operand):
                self._take(state, instruction, step, index, beat, cycle)
            else:
                puts.append(event)
                continue
            if step is not None and beat + 1 < step.beats:
                follows: _Event = (state, instruction, step, index, beat + 1)
                self._events[cycle + step.stride].append(follows)
        written: set[tuple[int, int, int, int]] = set()
        for state, instruction, step, index, beat in puts:
            assert isinstance(step, Result)
            self._put(state, instruction, step, beat, cycle, written)
            if beat + 1 < step.beats:
                follows = (state, instruction, step, index, beat + 1)
                self._events[cycle + step.stride].append(follows)
        del self._events[cycle]

    def _start(self, state: _Chip, each: Instruction, cycle: int) -> None:
        used: tuple[Operand | Result, ...] = (*each.reads, *each.writes)
        last = max((one.stream + one.width for one in used), default=0) - 1
        if last >= self._chip.streams_per_direction:
            raise ScheduleError(
                f"instruction {each.name} in cycle {cycle} uses stream {last}, the last is "
                f"{self._chip.streams_per_direction - 1}"
            )
        for index, operand in enumerate(each.reads):
            self._events[cycle + operand.offset].append((state, each, operand, index, 0))
        for index, result in enumerate(each.writes):
            if result.offset < 1:
                raise ScheduleError(f"instruction {each.name} has a result before it has run")
            self._events[cycle + result.offset].append((state, each, result, index, 0))
        if each.op == "load":
            self._load(state, each, cycle)
        elif each.op == "compute":
            _swap(state, each, cycle)
        elif each.op == "send":
            width = sum(operand.width for operand in each.reads)
            if each.stride * len(each.ports) < width * self._chip.link_vector_cycles:
                raise ScheduleError(f"instruction {each.name} sends faster than its links carry")

    def _load(self, state: _Chip, each: Instruction, cycle: int) -> None:
        key = (each.unit, each.plane)
        if key in state.buffers:
            raise ScheduleError(
                f"instruction {each.name} in cycle {cycle} overwrites weights of instruction "
                f"{state.buffers[key][0]} that no compute has taken"
            )
        if sum(operand.width for operand in each.reads) > self._chip.weight_streams:
            raise ScheduleError(f"instruction {each.name} is wider than the weight port")
        state.buffers[key] = (each.number, each.end)

    def _take(
        self, state: _Chip, each: Instruction, operand: Operand, index: int, beat: int, cycle: int
    ) -> None:
        found = state.registers[
            0 if operand.direction == EAST else 1,
            operand.stream : operand.stream + operand.width,
            self._units[each.unit],
        ]
        first = tag(operand.producer, beat, operand.part)
        if operand.width == 1:
            right = found[0] == first
        else:
            right = (found == first + _PART_NUMBERS[: operand.width]).all()
        if not right:
            raise ScheduleError(
                f"instruction {each.name} in cycle {cycle} does not find operand {index}: "
                f"vector {beat} of instruction {operand.producer}"
            )
        if each.op == "write":
            address = each.address + beat
            if address >= self._chip.slice_vectors:
                raise ScheduleError(f"instruction {each.name}: {each.unit} has no vector {address}")
            state.memory[each.unit][address] = each.value
        elif each.op == "send":
            width = sum(operand.width for operand in each.reads)
            far = cycle + self._chip.hop_cycles + width * self._chip.link_vector_cycles
            state.arrivals[far].add((each.number, beat))
        if self._datapath is not None:
            self._datapath.take(state.number, each, index, beat)

    def _put(
        self,
        state: _Chip,
        each: Instruction,
        result: Result,
        beat: int,
        cycle: int,
        written: set[tuple[int, int, int, int]],
    ) -> None:
        place = self._units[each.unit]
        if each.op == "read":
            address = each.address + beat // each.repeat
            if state.memory[each.unit].get(address) != each.value:
                raise ScheduleError(
                    f"instruction {each.name} in cycle {cycle} does not find value {each.value} "
                    f"at vector {address}"
                )
        elif each.op == "receive":
            sent = self._chips[self._peers[state.number]].arrivals.get(cycle, set())
            if (each.source, beat) not in sent:
                raise ScheduleError(
                    f"instruction {each.name} in cycle {cycle} receives nothing: vector {beat} of "
                    f"instruction {each.source} is not there"
                )
        way = 0 if result.direction == EAST else 1
        for stream in range(result.stream, result.stream + result.width):
            register = (state.number, way, stream, place)
            if register in written:
                raise ScheduleError(
                    f"instruction {each.name} in cycle {cycle} meets another on stream {stream}"
                )
            written.add(register)
        tags = tag(each.number, beat) + _PART_NUMBERS[: result.width]
        state.registers[way, result.stream : result.stream + result.width, place] = tags
        if self._datapath is not None:
            self._datapath.put(state.number, each, beat)


def _move(registers: np.ndarray) -> None:
    """Every vector goes on by one hop; what leaves the chip's edge is gone."""
    registers[0, :, 1:] = registers[0, :, :-1]
    registers[0, :, 0] = 0
    registers[1, :, :-1] = registers[1, :, 1:]
    registers[1, :, -1] = 0


def _swap(state: _Chip, each: Instruction, cycle: int) -> None:
    """The weights go from the buffer into the array, if the load is complete."""
    key = (each.unit, each.plane)
    loaded = state.buffers.get(key)
    if loaded is not None and loaded[0] == each.source and loaded[1] <= cycle:
        state.arrays[key] = each.source
        del state.buffers[key]
    if state.arrays.get(key) != each.source:
        raise ScheduleError(
            f"instruction {each.name} in cycle {cycle} does not find its weights: the load of "
            f"instruction {each.source} is not complete"
        )


def _check_ports(program: Program) -> None:
    held: dict[str, list[Instruction]] = defaultdict(list)
    for each in program.instructions:
        for port in each.ports:
            held[port].append(each)
    for port, users in held.items():
        users.sort(key=lambda each: each.cycle)
        for one, other in pairwise(users):
            if other.cycle < one.end:
                raise ScheduleError(
                    f"instruction {other.name} in cycle {other.cycle} needs {port}, which "
                    f"instruction {one.name} holds until cycle {one.end}"
                )
