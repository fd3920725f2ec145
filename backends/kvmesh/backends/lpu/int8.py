"""INT8 programs on single planes: the install of all four, and a product of matrices.

The model's own programs pair planes for FP16. These show the chip's published INT8 figures, and
with `datapath.Numbers` that the slices compute what a matrix product is.
"""

from math import ceil

from kvmesh.backends.lpu.chip import LpuChip
from kvmesh.backends.lpu.program import Instruction, Operand, Result
from kvmesh.backends.lpu.schedule import SIDES, Flow, Schedule, Value

_X_STREAM, _SUM_STREAM = 28, 24


class Int8:
    """Places loads and computes of single planes; see operations.Operations for FP16."""

    def __init__(self, chip: LpuChip) -> None:
        self.schedule = Schedule(chip)
        self._chip = chip
        self._free: dict[tuple[str, int], int] = {}

    def load(self, side: str, plane: int) -> tuple[Instruction, tuple[tuple[str, ...], int]]:
        """320 x 320 weights from 16 slices side by side straight into the plane's buffer.

        Row r lies in slice r % 16 at vector r // 16 of the returned place.
        """
        chip, schedule = self._chip, self.schedule
        flow, unit = Flow(schedule), f"MXM_{side}"
        beats = ceil(chip.vector_bytes / chip.weight_streams)
        one, first = schedule.weights(side, beats, chip.weight_streams // 2)
        two, second = schedule.weights(side, beats, chip.weight_streams // 2)
        form = Result(SIDES[side], 0, 1, 1, beats)
        reads = flow.read((one, first), unit, 0, form)
        upper = Result(SIDES[side], chip.weight_streams // 2, 1, 1, beats)
        reads += flow.read((two, second), unit, 0, upper)
        flow.add(
            Instruction(
                schedule.number(),
                unit,
                "load",
                0,
                (f"{unit}.load",),
                beats,
                reads=reads,
                plane=plane,
            )
        )
        flow.place(self._free.get((side, plane), 0))
        return schedule.instructions[-1], ((*one, *two), first)

    def compute(
        self,
        load: Instruction,
        x: tuple[Value, int, int],
        restart: bool = True,
        out: tuple[Value, int] | None = None,
    ) -> None:
        """x: (value, first vector, vectors). out: where the sums go, and the first vector there."""
        chip, schedule, unit = self._chip, self.schedule, load.unit
        flow, side = Flow(schedule), load.unit[-1]
        value, offset, beats = x
        slices, address = value.places[side]
        form = Result(SIDES[side], _X_STREAM, 1, 1, beats)
        reads = flow.read((slices, address + offset), unit, 0, form, value)
        delay = chip.stagger_cycles + chip.mxm_pipeline_cycles
        back = Result(-SIDES[side], _SUM_STREAM, 4, delay, beats)
        draft = flow.add(
            Instruction(
                schedule.number(),
                unit,
                "compute",
                0,
                (f"{unit}.compute{load.plane}",),
                beats,
                reads=reads,
                writes=(back,) if out else (),
                source=load.number,
                plane=load.plane,
                restart=restart,
            )
        )
        if out:
            flow.write(draft, back, out[0], out[1])
        self._free[side, load.plane] = flow.place(load.end, (out[0],) if out else ())

    def add(self, one: Value, other: Value) -> Value:
        """INT32 sums of two values of equal length, the first from the west, the other from the
        east hemisphere."""
        flow, result = Flow(self.schedule), self.schedule.allocate(one.beats, 4)
        reads: tuple[Operand, ...] = ()
        for value, side in ((one, "W"), (other, "E")):
            form = Result(-SIDES[side], 16, 4, 1, one.beats)
            reads += flow.read(value.places[side], "VXM", 0, form, value)
        outs = tuple(
            Result(way, 20, 4, self._chip.stagger_cycles, one.beats) for way in SIDES.values()
        )
        draft = flow.add(
            Instruction(
                self.schedule.number(),
                "VXM",
                "add",
                0,
                ("VXM.a0",),
                one.beats,
                reads=reads,
                writes=outs,
            )
        )
        for out in outs:
            flow.write(draft, out, result)
        flow.place(0, (result,))
        return result
