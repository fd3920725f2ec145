"""The simulated chip: its published rates, its arithmetic, and that it forgives nothing."""

import random
from dataclasses import replace

import numpy as np
import pytest

from kvmesh.backends.lpu.compile import CHIP, compile_model
from kvmesh.backends.lpu.datapath import Memory, Numbers
from kvmesh.backends.lpu.execute import Executor
from kvmesh.backends.lpu.int8 import Int8
from kvmesh.backends.lpu.program import Instruction, Program, Result, ScheduleError
from kvmesh.backends.lpu.schedule import Value
from kvmesh.backends.lpu.shapes import ModelShape

SMALL = ModelShape("small", 2, 320, 4, 2, 64, 640, 640, 512)


def put(memory: Memory, value: Value, rows: np.ndarray) -> None:
    """rows: int8 [beats, 320], into a value of one byte."""
    for slices, address in value.places.values():
        for beat, row in enumerate(rows):
            memory[slices[0], address + beat] = row.view(np.uint8)


def put_weights(memory: Memory, place: tuple[tuple[str, ...], int], weights: np.ndarray) -> None:
    slices, address = place
    for number, row in enumerate(weights):
        at = slices[number % len(slices)], address + number // len(slices)
        memory[at] = np.ascontiguousarray(row).view(np.uint8)


def get(memory: Memory, value: Value, side: str = "E") -> np.ndarray:
    """int32 [beats, 320]."""
    slices, address = value.places[side]
    planes = [
        np.stack([memory[name, address + beat] for beat in range(value.beats)]) for name in slices
    ]
    return np.ascontiguousarray(np.stack(planes, axis=2)).view("<i4")[:, :, 0]


def matmul(x: np.ndarray, weights: np.ndarray) -> tuple[Int8, Memory, Value]:
    """A program for x [m, k] times weights [k, n], k and n multiples of 320, and its memory."""
    build, memory = Int8(CHIP), Memory()
    m, depth, columns = len(x), x.shape[1] // 320, weights.shape[1] // 320
    value = build.schedule.constant(depth * m, 1)
    put(memory, value, np.concatenate(np.split(x, depth, axis=1)))
    result = build.schedule.allocate(columns * m, 4)
    for column in range(columns):
        side, plane = "EW"[column % 2], column // 2 % 2
        for chunk in range(depth):
            load, place = build.load(side, plane)
            tile = weights[chunk * 320 :, column * 320 :][:320, :320]
            put_weights(memory, place, tile)
            out = (result, column * m) if chunk == depth - 1 else None
            build.compute(load, (value, chunk * m, m), chunk == 0, out)
    return build, memory, result


def test_matrix_product_through_the_slices_is_numpys() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(-128, 128, (5, 640), np.int8)
    weights = rng.integers(-128, 128, (640, 1600), np.int8)
    build, memory, result = matmul(x, weights)
    program = build.schedule.program()
    Executor(CHIP, [program], datapath=Numbers([program], [memory])).run()
    expected = np.concatenate(np.split(x.astype(np.int32) @ weights.astype(np.int32), 5, axis=1))
    for side in "EW":
        assert np.array_equal(get(memory, result, side), expected)


def test_sums_of_two_products_are_numpys() -> None:
    rng = np.random.default_rng(2)
    x = rng.integers(-128, 128, (3, 320), np.int8)
    weights = rng.integers(-128, 128, (320, 640), np.int8)
    build, memory, products = matmul(x, weights)
    halves = [
        replace(
            products,
            beats=3,
            places={s: (names, at + first) for s, (names, at) in products.places.items()},
        )
        for first in (0, 3)
    ]
    total = build.add(*halves)
    program = build.schedule.program()
    Executor(CHIP, [program], datapath=Numbers([program], [memory])).run()
    expected = x.astype(np.int32) @ weights.astype(np.int32)
    assert np.array_equal(get(memory, total), expected[:, :320] + expected[:, 320:])


def test_four_planes_take_forty_cycles() -> None:
    build = Int8(CHIP)
    loads = [build.load(side, plane)[0] for plane in (0, 1) for side in "EW"]
    program = build.schedule.program()
    execution = Executor(CHIP, [program]).run()
    assert max(each.end for each in loads) - min(each.cycle for each in loads) == 40
    assert execution.busy["MXM_E.load"] + execution.busy["MXM_W.load"] == 80
    vectors = sum(each.beats * CHIP.weight_streams for each in loads)
    assert vectors * CHIP.vector_bytes == 4 * 320 * 320


def reads(slices: dict[str, int], cycles: int, direction_of: dict[str, int]) -> Program:
    """Every slice reads one vector per cycle onto its stream, and so on."""
    instructions = [
        Instruction(
            number,
            name,
            "read",
            1,
            (f"{name}.read",),
            cycles,
            writes=(Result(direction_of[name], stream, 1, 1, cycles),),
        )
        for number, (name, stream) in enumerate(slices.items())
    ]
    return Program(tuple(instructions), {(name, 0): cycles for name in slices})


def test_streams_carry_64_vectors_per_cycle_and_no_65th() -> None:
    inward = {"W": 1, "E": -1}
    slices = {f"MEM_{side}{i}": i for side in "WE" for i in range(32)}
    directions = {name: inward[name[4]] for name in slices}
    program = reads(slices, 10, directions)
    Executor(CHIP, [program]).run()
    moved = sum(each.beats for each in program.instructions) * CHIP.vector_bytes
    assert moved == 10 * 20_480
    slices["MEM_W33"], directions["MEM_W33"] = 32, 1
    with pytest.raises(ScheduleError, match="stream 32"):
        Executor(CHIP, [reads(slices, 10, directions)]).run()


def test_peak_of_the_planes() -> None:
    """Four planes, each with a vector per cycle: 819.2 TOPS at 1 GHz, counted by the execution."""
    chip, vectors = replace(CHIP, clock_hz=1e9), 100
    build = Int8(chip)
    inputs = [build.schedule.constant(vectors, 1) for _ in (0, 1)]
    for plane in (0, 1):
        for side in "EW":
            load, _ = build.load(side, plane)
            build.compute(load, (inputs[plane], 0, vectors))
    execution = Executor(chip, [build.schedule.program()]).run()
    busy = [n for port, n in execution.busy.items() if ".compute" in port]
    assert len(busy) == chip.mxm_planes
    operations = sum(busy) * 2 * 320 * 320
    assert operations / vectors * chip.clock_hz == 819.2e12


def test_one_vector_is_bound_by_installing_weights() -> None:
    """Batch 1: the weight ports hardly ever rest, the arrays hardly ever work."""
    weights = np.zeros((320, 320 * 64), np.int8)
    build, _, _ = matmul(np.ones((1, 320), np.int8), weights)
    execution = Executor(CHIP, [build.schedule.program()]).run()
    install = weights.size // CHIP.install_bytes_per_cycle
    assert execution.busy["MXM_E.load"] == execution.busy["MXM_W.load"] == install
    assert install <= execution.cycles <= 1.25 * install
    computes = [n for port, n in execution.busy.items() if ".compute" in port]
    assert sum(computes) / len(computes) < 0.05 * install


@pytest.fixture(scope="module")
def small() -> Program:
    return compile_model(SMALL, 1, "k4v4", 64).parts[0].program


def test_two_runs_are_the_same_cycle_by_cycle(small: Program) -> None:
    again = compile_model(SMALL, 1, "k4v4", 64).parts[0]
    assert again.program == small
    assert Executor(CHIP, [small]).run() == again.execution


@pytest.mark.parametrize("seed", range(12))
def test_an_instruction_moved_by_one_cycle_is_found(small: Program, seed: int) -> None:
    chosen = random.Random(seed)
    at = chosen.randrange(len(small.instructions))
    moved = small.instructions[at]
    moved = replace(moved, cycle=moved.cycle + chosen.choice((-1, 1)))
    changed = (*small.instructions[:at], moved, *small.instructions[at + 1 :])
    with pytest.raises(ScheduleError, match="instruction"):
        Executor(CHIP, [replace(small, instructions=changed)]).run()


def test_the_error_names_instruction_cycle_and_operand(small: Program) -> None:
    at, alu = next((i, x) for i, x in enumerate(small.instructions) if x.op == "alu")
    changed = list(small.instructions)
    changed[at] = replace(alu, cycle=alu.cycle + 1)
    text = rf"instruction {alu.number} \(VXM alu .*\) in cycle {alu.cycle + 1} .* operand 0"
    with pytest.raises(ScheduleError, match=text):
        Executor(CHIP, [replace(small, instructions=tuple(changed))]).run()


def test_group_in_step_equals_one_chip_that_stands_for_it() -> None:
    part = compile_model(SMALL, 2, "fp16", 64, whole=False).parts[0]
    both = Executor(CHIP, [part.program] * 2, peers=[1, 0]).run()
    assert both.cycles == part.execution.cycles
    sends = [x for x in part.program.instructions if x.op == "send"]
    late = replace(sends[0], cycle=sends[0].cycle + 1)
    other = replace(part.program, instructions=tuple(
        late if x.number == late.number else x for x in part.program.instructions
    ))  # fmt: skip
    with pytest.raises(ScheduleError):
        Executor(CHIP, [part.program, other], peers=[1, 0]).run()
