"""Real numbers for an execution: what each vector on each stream holds, byte by byte.

Knows what the proof of the arithmetic needs: reads, writes, links, INT8 products with INT32 sums
(four byte planes, lowest first) and sums of two such values.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvmesh.backends.lpu.program import Instruction, Program, ScheduleError

Bytes = npt.NDArray[np.uint8]  # [320], one per lane
Memory = dict[tuple[str, int], Bytes]  # slice and address


class Numbers:
    """See execute.Datapath. Every vector comes from the producer whose tag was found in place.

    memories: one for each chip, filled by the caller, and written by the program.
    """

    def __init__(
        self,
        programs: list[Program],
        memories: list[Memory],
        peers: Mapping[int, int] | None = None,
    ) -> None:
        self.memories = memories
        self._by_number = [{each.number: each for each in p.instructions} for p in programs]
        self._peers = peers or {}
        self._made: dict[tuple[int, int, int], list[Bytes]] = {}  # chip, instruction, beat
        self._taken: dict[tuple[int, int, int], list[Bytes]] = defaultdict(list)
        self._sums: dict[tuple[int, str, int, int], npt.NDArray[np.int32]] = {}

    def take(self, chip: int, instruction: Instruction, operand: int, beat: int) -> None:
        taken = instruction.reads[operand]
        vectors = self._made[chip, taken.producer, beat][taken.part : taken.part + taken.width]
        key = chip, instruction.number, beat
        self._taken[key] += vectors
        if instruction.op == "write":
            self.memories[chip][instruction.unit, instruction.address + beat] = vectors[0]
        elif instruction.op == "compute":
            self._multiply(chip, instruction, beat)

    def put(self, chip: int, instruction: Instruction, beat: int) -> None:
        key = chip, instruction.number, beat
        if instruction.op == "read":
            address = instruction.address + beat // instruction.repeat
            self._made[key] = [self.memories[chip][instruction.unit, address]]
        elif instruction.op == "compute":
            place = chip, instruction.unit, instruction.plane, beat
            self._made[key] = _split(self._sums[place])
        elif instruction.op == "receive":
            peer = self._peers.get(chip, chip)
            self._made[key] = self._taken[peer, instruction.source, beat]
        elif instruction.op == "add":
            one, other = self._taken[key][:4], self._taken[key][4:]
            self._made[key] = _split(_join(one) + _join(other))
        else:
            raise ScheduleError(f"instruction {instruction.name}: its numbers are not modelled")

    def _multiply(self, chip: int, instruction: Instruction, beat: int) -> None:
        x = self._taken[chip, instruction.number, beat][0].view(np.int8).astype(np.int32)
        load = self._by_number[chip][instruction.source]
        rows = [
            row for i in range(load.beats) for row in self._taken[chip, load.number, i]
        ]  # row r: the weights of input r, one for each output lane
        weights = np.stack(rows).view(np.int8).astype(np.int32)
        place = chip, instruction.unit, instruction.plane, beat
        product = x[: len(weights)] @ weights
        before = 0 if instruction.restart else self._sums[place]
        self._sums[place] = np.asarray(product + before, np.int32)


def _split(values: npt.NDArray[np.int32]) -> list[Bytes]:
    return list(np.ascontiguousarray(values.astype("<i4").view(np.uint8).reshape(-1, 4).T))


def _join(planes: list[Bytes]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(np.stack(planes, axis=1)).view("<i4").reshape(-1)
