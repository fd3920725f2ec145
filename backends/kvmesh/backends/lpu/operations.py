"""The operations that a model's layers are lowered to, each as flows on the slices of one chip.

Streams are shared out once and for all: [0, 16) carry weights; of the others, 16 to 19 carry
operands to the VXM and SXM, 20 to 23 what the VXM puts out, 24 to 27 what the MXM puts out, 28 and
29 what goes into the MXM, 30 and 31 what comes from the links. 16 to 23 inward carry what the SXM
puts out.
"""

from dataclasses import dataclass
from math import ceil, log2

from kvmesh.backends.lpu.chip import EAST, WEST
from kvmesh.backends.lpu.program import Instruction, Operand, Result
from kvmesh.backends.lpu.schedule import SIDES, WEIGHT_GROUP, Flow, Schedule, Value

_OPERANDS, _VXM_OUT, _MXM_OUT, _MXM_IN, _LINK_IN = 16, 20, 24, 28, 30
FP16, FP32 = 2, 4  # bytes, so streams, of a value


@dataclass(frozen=True, slots=True)
class Weights:
    """How one matrix lies in memory. bits: of one value there. alu_ops: VXM passes of each value
    on its way to the MXM, which takes FP16."""

    bits: float = 8
    alu_ops: int = 1


_MODEL_WEIGHTS = Weights()


class Operations:
    """Adds operations to one chip's schedule, in the order of the calls, each as early as fits."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.chip = schedule.chip
        self._buffer_free = {"E": 0, "W": 0}
        self._array_free = {"E": 0, "W": 0}

    def vxm(
        self,
        label: str,
        inputs: tuple[Value, ...],
        out: tuple[int, int] | None = None,
        alus: int = 1,
        into: tuple[Value, int] | None = None,
    ) -> Value:
        """An operation on the lanes of one or two values, the first from the west, the second
        from the east hemisphere; a value with fewer vectors is held.

        out: (vectors, width) of the result; fewer vectors than came in is a reduction, whose
        result follows the last operand. None: as the first input, in FP16. into: a value that
        the result is a part of, and its first vector there.
        """
        flow = Flow(self.schedule)
        beats = max(value.beats for value in inputs)
        out_beats, width = out or (inputs[0].beats, FP16)
        reads: tuple[Operand, ...] = ()
        for value, side in zip(inputs, "WE", strict=False):
            way = -SIDES[side]
            form = Result(way, _OPERANDS, value.width, 1, value.beats)
            reads += flow.read(value.places[side], "VXM", 0, form, value)
        delay = self.chip.stagger_cycles + (0 if out_beats == beats else beats - 1)
        result, first = into or (self.schedule.allocate(out_beats, width), 0)
        self._vxm_out(flow, label, reads, (beats, alus), (result, out_beats, delay), (0, first))
        flow.place(0, (result,))
        return result

    def _vxm_out(
        self,
        flow: Flow,
        label: str,
        reads: tuple[Operand, ...],
        work: tuple[int, int],
        out: tuple[Value, int, int],
        at: tuple[int, int],
    ) -> None:
        """work: (vectors, ALUs). out: (value, vectors, cycles from the first operand to the first
        of them). at: (cycle, first vector of the value)."""
        (beats, alus), (value, out_beats, delay), (cycle, first) = work, out, at
        results = tuple(
            Result(way, _VXM_OUT, value.width, delay, out_beats) for way in (EAST, WEST)
        )
        number = self.schedule.number()
        ports = tuple(f"VXM.a{i}" for i in range(alus))
        draft = Instruction(
            number, "VXM", "alu", cycle, ports, beats, reads=reads, writes=results, label=label
        )
        flow.add(draft)
        for result in results:
            flow.write(draft, result, value, first)

    def reduce_lanes(self, label: str, value: Value) -> Value:
        """Sum or maximum over all lanes, then in all lanes: rounds of an SXM shift and a VXM pass.

        value: FP32, any number of vectors.
        """
        result = self.schedule.allocate(value.beats, FP32)
        hops = abs(self.chip.position("SXM_E") - self.chip.position("VXM"))
        at_once = 2 * (hops + self.chip.stagger_cycles)  # a round: more would meet themselves
        for first in range(0, value.beats, at_once):
            beats = min(at_once, value.beats - first)
            self._tree(label, value, result, (first, beats))
        return result

    def _tree(self, label: str, value: Value, result: Value, part: tuple[int, int]) -> None:
        flow, chip = Flow(self.schedule), self.chip
        first, beats = part
        slices, address = value.places["W"]
        form = Result(EAST, _OPERANDS, FP32, 1, beats)
        reads = flow.read((slices, address + first), "VXM", 0, form, value)
        at = 0
        for _ in range(ceil(log2(chip.vector_bytes))):
            there = Result(EAST, _VXM_OUT, FP32, chip.stagger_cycles, beats)
            passed = flow.add(
                Instruction(
                    self.schedule.number(), "VXM", "alu", at, ("VXM.a0",), beats,
                    reads=reads, writes=(there,), label=label,
                )
            )  # fmt: skip
            arrival = flow.carry("VXM", "SXM_E", there, at + there.offset)
            back = Result(WEST, _OPERANDS, 2 * FP32, chip.stagger_cycles, beats)
            taken = Operand(EAST, _VXM_OUT, FP32, passed.number, beats)
            shifted = flow.add(
                Instruction(
                    self.schedule.number(), "SXM_E", "shift", arrival, ("SXM_E.shift",), beats,
                    reads=(taken,), writes=(back,), label=label,
                )
            )  # fmt: skip
            at = flow.carry("SXM_E", "VXM", back, arrival + back.offset)
            reads = (Operand(WEST, _OPERANDS, 2 * FP32, shifted.number, beats),)
        out = (result, beats, chip.stagger_cycles)
        self._vxm_out(flow, label, reads, (beats, 1), out, (at, first))
        flow.place(0, (result,))

    def permute(self, label: str, value: Value, out_beats: int) -> Value:
        """Moves lanes: exchanges halves of heads, or lays out vectors as heads and back."""
        flow = Flow(self.schedule)
        beats = max(value.beats, out_beats)
        form = Result(EAST, _OPERANDS, value.width, 1, value.beats)
        reads = flow.read(value.places["E"], "SXM_E", 0, form, value)
        delay = self.chip.stagger_cycles + (0 if out_beats == value.beats else value.beats - 1)
        out = Result(WEST, _OPERANDS, value.width, delay, out_beats)
        draft = flow.add(
            Instruction(
                self.schedule.number(), "SXM_E", "permute", 0, ("SXM_E.permute",), beats,
                reads=reads, writes=(out,), label=label,
            )
        )  # fmt: skip
        result = self.schedule.allocate(out_beats, value.width)
        flow.write(draft, out, result)
        flow.place(0, (result,))
        return result

    def matmul(
        self,
        label: str,
        x: Value,
        shape: tuple[int, int, int],
        weights: Weights = _MODEL_WEIGHTS,
        first: int = 0,
    ) -> Value:
        """x [rows of M vectors each] times weights [K, N], FP16 with FP32 sums, both MXMs.

        shape: (M, K, N). x lies from vector `first` on as ceil(K / 320) groups of M vectors; the
        result, FP32, as ceil(N / 320) groups of M vectors.
        """
        m, k, n = shape
        lanes = self.chip.vector_bytes
        depth, columns = ceil(k / lanes), ceil(n / lanes)
        result = self.schedule.allocate(columns * m, FP32)
        for column in range(0, columns, 2):
            sides = "EW"
            if column == columns - 1:  # a column alone goes where the weight port is free first
                sides = min("EW", key=lambda side: self._buffer_free[side])
            for chunk in range(depth):
                rows = min(lanes, k - chunk * lanes)
                for i, side in enumerate(sides):
                    load = self._load(label, side, rows, weights)
                    out = (result, (column + i) * m) if chunk == depth - 1 else None
                    part = x, first + chunk * m, m
                    self._compute(label, side, load, part, (chunk == 0, out))
        return result

    def _load(self, label: str, side: str, rows: int, weights: Weights) -> Instruction:
        """Weights from memory through the VXM into the MXM's buffer of that side."""
        flow, chip = Flow(self.schedule), self.chip
        alus = chip.vxm_alus // 2  # each hemisphere has its half, so that both load at once
        values = chip.weight_streams // FP16  # per lane and cycle
        while values > 1 and (
            values * weights.alu_ops > alus or ceil(values * weights.bits / 8) > WEIGHT_GROUP
        ):
            values //= 2
        beats, width = ceil(rows / values), ceil(values * weights.bits / 8)
        place = self.schedule.weights(side, beats, width)
        way = SIDES[side]
        reads = flow.read(place, "VXM", 0, Result(-way, 0, width, 1, beats))
        first = 0 if side == "W" else alus
        ports = tuple(f"VXM.a{first + i}" for i in range(min(alus, values * weights.alu_ops)))
        out = Result(way, 0, values * FP16, chip.stagger_cycles, beats)
        decode = flow.add(
            Instruction(
                self.schedule.number(), "VXM", "convert", 0, ports, beats,
                reads=reads, writes=(out,), label=label,
            )
        )  # fmt: skip
        unit = f"MXM_{side}"
        at = flow.carry("VXM", unit, out, out.offset)
        taken = Operand(way, 0, values * FP16, decode.number, beats)
        load = Instruction(
            self.schedule.number(), unit, "load", at, (f"{unit}.load",), beats,
            reads=(taken,), label=label,
        )  # fmt: skip
        flow.add(load)
        flow.place(self._buffer_free[side] - at)
        return self.schedule.instructions[-1]

    def _compute(
        self,
        label: str,
        side: str,
        load: Instruction,
        x: tuple[Value, int, int],
        sums: tuple[bool, tuple[Value, int] | None],
    ) -> None:
        """x: (value, first vector, vectors). sums: (start anew, where the sums go at the end)."""
        flow, chip, unit = Flow(self.schedule), self.chip, f"MXM_{side}"
        (value, offset, beats), (restart, out) = x, sums
        slices, address = value.places[side]
        form = Result(SIDES[side], _MXM_IN, FP16, 1, beats, 2)  # FP16 passes at half the rate
        reads = flow.read((slices[:FP16], address + offset), unit, 0, form, value)
        delay = chip.stagger_cycles + chip.mxm_pipeline_cycles
        back = Result(-SIDES[side], _MXM_OUT, FP32, delay, beats, 2)
        draft = flow.add(
            Instruction(
                self.schedule.number(), unit, "compute", 0, (f"{unit}.compute",), beats, 2,
                reads=reads, writes=(back,) if out else (), source=load.number, restart=restart,
                label=label,
            )
        )  # fmt: skip
        if out:
            flow.write(draft, back, out[0], out[1])
        at = flow.place(max(load.end, self._array_free[side]), (out[0],) if out else ())
        self._buffer_free[side] = at  # the weights go from buffer to array as it starts
        self._array_free[side] = at + 2 * beats

    def exchange(self, label: str, value: Value, peers: int, repeat: int = 1) -> Value:
        """Sends vectors to the peers in turn, one link each, and takes theirs; FP16.

        value: read on the east side, `repeat` times each vector, so that all peers can have it.
        """
        flow, chip = Flow(self.schedule), self.chip
        beats = value.beats * repeat
        stride = ceil(FP16 * chip.link_vector_cycles / peers)
        form = Result(EAST, _OPERANDS, FP16, 1, beats, stride)
        reads = flow.read(value.places["E"], "C2C_E", 0, form, value, repeat)
        ports = tuple(f"C2C_E.send{i}" for i in range(peers))
        send = flow.add(
            Instruction(
                self.schedule.number(), "C2C_E", "send", 0, ports, beats, stride,
                reads=reads, label=label,
            )
        )  # fmt: skip
        arrival = chip.hop_cycles + FP16 * chip.link_vector_cycles
        out = Result(WEST, _LINK_IN, FP16, 1, beats, stride)
        ports = tuple(f"C2C_E.receive{i}" for i in range(peers))
        receive = flow.add(
            Instruction(
                self.schedule.number(), "C2C_E", "receive", arrival - 1, ports, beats, stride,
                writes=(out,), source=send.number, label=label,
            )
        )  # fmt: skip
        result = self.schedule.allocate(beats, FP16)
        flow.write(receive, out, result)
        flow.place(0, (result,))
        return result
