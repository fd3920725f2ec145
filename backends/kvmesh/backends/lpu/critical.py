"""The critical path of a program: what each instruction on the way to the end was waiting for."""

from collections import defaultdict
from dataclasses import dataclass

from kvmesh.backends.lpu.program import Instruction, Program


@dataclass(frozen=True, slots=True)
class Leg:
    """Instructions of one operation on one kind of unit that follow one another on the path.

    cycles: from its begin to the next leg's, the hops between them included.
    """

    label: str
    unit: str
    begin: int
    cycles: int


def critical_path(program: Program, end: int) -> tuple[Leg, ...]:
    """From cycle 0 to `end`, without gaps: backwards from the instruction that ends last, each
    time to the one whose result or whose port came free last."""
    instructions = {each.number: each for each in program.instructions}
    if not instructions:
        return ()
    before = _predecessors(program)

    def free_from(number: int) -> tuple[int, int]:
        # A read could have come earlier, but for the write of what it reads.
        each = instructions[number]
        if each.op == "read":
            return max((instructions[n].end for n in before[number]), default=0), number
        return each.end, number

    here = max(program.instructions, key=lambda each: (each.end, each.number))
    chain = [here]
    while before[here.number]:
        here = instructions[max(before[here.number], key=free_from)]
        chain.append(here)
    chain.reverse()
    begins = [0, *(each.cycle for each in chain[1:]), end]
    legs: list[Leg] = []
    for each, begin, follows in zip(chain, begins[:-1], begins[1:], strict=True):
        label = each.label or (legs[-1].label if legs else "")
        kind = each.unit.partition("_")[0]
        if kind == "MEM" and legs:
            last = legs.pop()
            legs.append(Leg(last.label, last.unit, last.begin, follows - last.begin))
        elif legs and (legs[-1].label, legs[-1].unit) == (label, kind):
            legs[-1] = Leg(label, kind, legs[-1].begin, follows - legs[-1].begin)
        else:
            legs.append(Leg(label, kind, begin, follows - begin))
    return tuple(legs)


def _predecessors(program: Program) -> dict[int, list[int]]:
    """Number -> instructions that it cannot run before."""
    writers: dict[int, list[Instruction]] = defaultdict(list)
    taken: dict[str, Instruction] = {}
    before: dict[int, list[int]] = {each.number: [] for each in program.instructions}
    ordered = sorted(program.instructions, key=lambda each: each.cycle)
    for each in ordered:
        if each.op == "write":
            writers[each.value].append(each)
    for each in ordered:
        needs = before[each.number]
        if each.op == "load" and each.unit in taken:
            needs.append(taken[each.unit].number)  # its data lay ready; it waited for the buffer
            continue
        needs += [operand.producer for operand in each.reads]
        if each.op == "read" and each.value in writers:
            done = [w for w in writers[each.value] if w.end <= each.cycle]
            needs += [w.number for w in sorted(done, key=lambda w: w.end)[-1:]]
        if each.source >= 0:
            needs.append(each.source)
        if each.op == "compute":
            taken[each.unit] = each
    return before


def by_label(legs: tuple[Leg, ...]) -> list[tuple[str, str, int]]:
    """(operation, kind of unit, cycles on the path), most first."""
    totals: dict[tuple[str, str], int] = defaultdict(int)
    for leg in legs:
        totals[leg.label, leg.unit] += leg.cycles
    found = [(label, unit, cycles) for (label, unit), cycles in totals.items()]
    return sorted(found, key=lambda row: -row[2])
