"""Every instruction set computes the same integers, those of NumPy."""

import functools
import itertools

import numba
import numpy as np
import pytest
from llvmlite import binding, ir

from kvmesh.kernels import codebook, reference
from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.dot import loop_function, make_dot
from kvmesh.kernels.cpu.unpack import make_unpack

PATHS = [*simd.available(), "emulated"]


@functools.cache
def compiled(make, path):
    function = make(path)

    @numba.njit
    def run(*arguments):
        function(*arguments)

    return run


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_computes_the_same_integers(path, bits):
    rng = np.random.default_rng(bits)
    shapes = ((32, 64), (48, 64), (256, 64), (64, 16), (64, 80), (64, 256))
    for (length, lanes), rows in itertools.product(shapes, (1, 2, 4, 7)):
        codes = rng.integers(0, 1 << bits, (1, length, lanes)).astype(np.uint8)
        weights = rng.integers(-simd.LARGEST, simd.LARGEST + 1, (rows, length)).astype(np.int16)
        weights[0] = simd.LARGEST
        high = ((weights.astype(np.int32) + 128) >> 8).astype(np.int8)
        low = (weights - 256 * high.astype(np.int32)).astype(np.int8)
        wide = np.ascontiguousarray(weights.reshape(rows, -1, 4)[..., simd.ORDER])
        plane = reference.pack(codes, bits).reshape(-1)
        out = np.full((rows + 1, lanes + 16), -1, np.int32)
        places = (x.ctypes.data for x in (plane, wide, high, low, out))
        compiled(make_dot, path)(
            bits, *places, rows, length, lanes, lanes + 16, *[plane.ctypes.data] * 2
        )
        assert (out[rows] == -1).all() and (out[:, lanes:] == -1).all()
        out = out[:rows, :lanes]
        u = codebook.grid(bits)[codes[0]].astype(np.int64)
        np.testing.assert_array_equal(out, (weights.astype(np.int64) @ u).astype(np.int32))
        centered = 2 * out - np.int32(255) * weights.sum(axis=1, dtype=np.int32)[:, None]
        np.testing.assert_array_equal(centered, weights.astype(np.int64) @ (2 * u - 255))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("path", PATHS)
def test_unpacked_codes_are_a_plane_of_bytes(path, bits):
    rng = np.random.default_rng(bits)
    for length, lanes in ((32, 64), (48, 64), (256, 64), (64, 16), (64, 80), (64, 256)):
        codes = rng.integers(0, 1 << bits, (1, length, lanes)).astype(np.uint8)
        plane = reference.pack(codes, bits).reshape(-1)
        out = np.full(length * lanes + 64, 7, np.uint8)
        compiled(make_unpack, path)(
            bits, plane.ctypes.data, out.ctypes.data, length, lanes, *[plane.ctypes.data] * 2
        )
        u = codebook.grid(bits)[codes]
        np.testing.assert_array_equal(out[:-64], reference.pack(u, 8).reshape(-1))
        assert (out[-64:] == 7).all()


def assembly(path, bits, cpu):
    module = ir.Module()
    loop_function(module, simd.PATHS[path], bits, simd.ROWS).linkage = ""  # keep it, unused
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("x86_64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu=cpu, opt=3)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("path", "cpu", "register", "product"),
    [
        ("avx512vbmi", "sapphirerapids", "%zmm", "vpdpbusd"),
        ("avx512", "znver4", "%zmm", "vpdpbusd"),
        ("avx2", "znver3", "%ymm", "vpmaddwd"),
    ],
)
def test_code_for_a_cpu_has_its_instructions_and_does_not_spill(path, cpu, register, product, bits):
    lines = assembly(path, bits, cpu).splitlines()
    wide = [line for line in lines if register in line]
    for_each_word = simd.ROWS * 2 * (8 // (2 if bits == 3 else bits))  # of the lanes left over too
    products = sum(product in line for line in wide)  # the compiler may unroll the loop
    assert products and products % for_each_word == 0
    lookup = "vpermb" if path == "avx512vbmi" else "vpshufb"
    assert any(lookup in line for line in wide) == (bits < 8)
    stores = [line for line in wide if line.split("#")[0].rstrip().endswith(")")]
    kept = [line for line in stores if "%rsp" in line.rsplit(",", 1)[-1]]
    sums = {line.split()[-1] for line in lines if "vpaddd" in line or "vpdpbusd" in line}
    assert len(sums) >= simd.ROWS * simd.PATHS[path].groups
    # Sums stay in registers. With AVX2's sixteen some words and tables do not: they are read again.
    assert len(kept) <= {"avx2": 20, "avx512": 1, "avx512vbmi": 0}[path], kept
    for before, line in itertools.pairwise(lines):
        assert not (("vpaddd" in before or product in before) and line in kept), (before, line)
