"""NVRTC compiles every kernel for every architecture, and nothing spills."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmesh.kernels.cuda.compile import (
    ARCHITECTURES,
    CompileError,
    compile_unit,
    cubin_path,
    missing,
    parse_usage,
)
from kvmesh.kernels.cuda.device import architecture_of
from kvmesh.kernels.cuda.occupancy import LIMITS, block_shape, resident_warps
from kvmesh.kernels.cuda.source import KERNELS, Unit
from kvmesh.kernels.layout import CODECS

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

DIMS = (256, 80, 192, 64, 112, 96, 256, 192)


def units() -> list[tuple[Unit, str]]:
    """k4v4 at 128 on all architectures; every codec at some head_dim on one of them in turn.

    `python -m kvmesh.kernels.cuda.compile` goes through all of them.
    """
    pairs = [
        (unit, arch)
        for arch in ARCHITECTURES
        for unit in (
            Unit("blocks"),
            Unit("stream"),
            Unit("seal", 128, 4, 4),
            Unit("attend", 128, 4, 4),
        )
    ]
    for turn, (codec, dim) in enumerate(zip(CODECS.values(), DIMS, strict=True)):
        unit = Unit("attend", dim, codec.key_bits, codec.value_bits)
        pairs.append((unit, ARCHITECTURES[turn % len(ARCHITECTURES)]))
    pairs += [(Unit("seal", 80, 3, 2), "sm_90a"), (Unit("seal", 192, 8, 16), "sm_120a")]
    return pairs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_kernels_compile_without_spills(architecture):
    with ThreadPoolExecutor(2) as pool:  # NVRTC runs without the interpreter's lock
        pairs = [pair for pair in units() if pair[1] == architecture]
        found = pool.map(lambda pair: (*pair, compile_unit(*pair)), pairs)
        for unit, arch, compiled in found:
            assert {use.kernel for use in compiled.usage} == set(KERNELS[unit.name])
            for use in compiled.usage:
                assert (use.stack, use.spills) == (0, 0), f"{unit} on {arch}: {use}"
            assert compiled.cubin[:4] == b"\x7fELF"


def test_cuda_sm_holds_as_many_warps_as_the_scarcest_allows():
    hopper = LIMITS["sm_90a"]
    # 64 registers a thread fill the file with 32 warps, 32 of them with 64.
    assert resident_warps(hopper, 64, 128, 0) == 32
    assert resident_warps(hopper, 32, 256, 0) == 64
    assert resident_warps(hopper, 33, 256, 0) == 48  # 40 by the unit of a warp
    assert resident_warps(hopper, 32, 128, 56 << 10) == 16  # four blocks of shared memory
    assert resident_warps(hopper, 16, 32, 0) == 32  # as many blocks as there may be
    for unit in (Unit("attend", 128, 4, 4), Unit("seal", 128, 4, 4), Unit("blocks")):
        for kernel in KERNELS[unit.name]:
            threads, shared = block_shape(unit, kernel)
            assert threads % 32 == 0 and shared <= 99 << 10


def test_cuda_machine_code_is_kept_by_digest_and_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cubin_path(Unit("blocks"), "sm_90a")
    written = first.stat().st_mtime_ns
    assert cubin_path(Unit("blocks"), "sm_90a").stat().st_mtime_ns == written
    assert cubin_path(Unit("blocks"), "sm_80") != first
    assert Unit("seal", 64, 4, 4).digest != Unit("seal", 64, 4, 3).digest


def test_cuda_spills_and_errors_are_seen():
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_80'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 70 registers, used 0 barriers\n"
    )
    (use,) = parse_usage(log)
    assert (use.kernel, use.registers, use.stack, use.spills) == ("k", 70, 8, 16)
    with pytest.raises(CompileError):
        compile_unit(Unit("seal", 64, 5, 5), "sm_90a")


@pytest.mark.parametrize(
    ("number", "name"), [("80", "sm_80"), ("90", "sm_90a"), ("107", "sm_107a")]
)
def test_cuda_architecture_names(number, name):
    assert architecture_of(number) == name
