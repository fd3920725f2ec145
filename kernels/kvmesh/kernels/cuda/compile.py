"""CUDA text to machine code with NVRTC, which needs neither a GPU nor a driver.

Machine code is kept under the user's cache folder, by digest of the text and by architecture.
"""

import importlib
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.kernels.cuda.occupancy import LIMITS, block_shape, resident_warps
from kvmesh.kernels.cuda.source import FOLDER, Unit
from kvmesh.kernels.layout import CODECS

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_103a", "sm_107a", "sm_120a")
OPTIONS = ("-std=c++17", "-fmad=false", "-default-device", "--ptxas-options=-v")
_USED = re.compile(r"Used (\d+) registers")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")


class CompileError(Exception):
    """NVRTC refuses the text; the message is its log."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes on one architecture. stack and spills in bytes per thread."""

    kernel: str
    registers: int
    stack: int
    spills: int


@dataclass(frozen=True, slots=True)
class Compiled:
    cubin: bytes
    usage: tuple[Usage, ...]


def missing() -> str | None:
    """None if NVRTC can be imported, else what to install."""
    # Other distributions have a part of the namespace package `cuda`.
    for name in ("cuda", "cuda.bindings"):
        if importlib.util.find_spec(name) is None:
            return "cuda-bindings cannot be imported; install kvmesh[cuda]"
    return None


def compile_unit(unit: Unit, architecture: str) -> Compiled:
    """Raises CompileError with NVRTC's log."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")

    _, program = _checked(nvrtc.nvrtcCreateProgram(unit.text.encode(), b"unit.cu", 0, [], []))
    try:
        options = [f"--gpu-architecture={architecture}", f"-I{FOLDER}", *OPTIONS]
        (result,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{unit} for {architecture}:\n{log}")
        cubin = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, parse_usage(log))


def cubin_path(unit: Unit, architecture: str) -> Path:
    """The unit's machine code in a file, compiled unless it is there."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "kvmesh" / "cuda" / f"{unit.name}-{unit.digest[:32]}-{architecture}.cubin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(compile_unit(unit, architecture).cubin)
        part.replace(path)
    return path


def parse_usage(log: str) -> tuple[Usage, ...]:
    """What ptxas told of each kernel."""
    found: list[Usage] = []
    for part in log.split("Compiling entry function")[1:]:
        name = _ENTRY.search("Compiling entry function" + part)
        stack, used = _STACK.search(part), _USED.search(part)
        if name is None or stack is None or used is None:
            raise CompileError(f"ptxas reports in an unknown form:\n{log}")
        frame, stores, loads = (int(value) for value in stack.groups())
        found.append(Usage(name[1], int(used[1]), frame, stores + loads))
    return tuple(found)


def compile_all(head_dims: Sequence[int]) -> Iterator[tuple[Unit, str, Usage]]:
    """What every kernel takes, for every codec, head_dim and architecture. Takes long."""
    units = [Unit("blocks"), Unit("stream")]
    for codec, dim in itertools.product(CODECS.values(), head_dims):
        units += [Unit(name, dim, codec.key_bits, codec.value_bits) for name in ("seal", "attend")]
    with ThreadPoolExecutor() as pool:  # NVRTC runs without the interpreter's lock
        pairs = list(itertools.product(units, ARCHITECTURES))
        for (unit, arch), made in zip(
            pairs, pool.map(lambda pair: compile_unit(*pair), pairs), strict=True
        ):
            for use in made.usage:
                yield unit, arch, use


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(answer[0]) != 0:
        raise CompileError(f"NVRTC: {answer[0].name}")
    return answer


def _read(size_of: Any, read: Any, program: Any) -> bytes:
    _, size = _checked(size_of(program))
    data = bytearray(size)
    # The binding writes into the bytes object that it is given.
    target = bytes(data)
    _checked(read(program, target))
    return target


def _describe(unit: Unit, architecture: str, use: Usage) -> str:
    widths = f"d={unit.head_dim:<4} k{unit.key_bits}v{unit.value_bits:<3}"
    threads, shared = block_shape(unit, use.kernel)
    limits = LIMITS.get(architecture)
    held = (
        ""
        if limits is None
        else (f", {resident_warps(limits, use.registers, threads, shared)} of {limits.warps} warps")
    )
    return (
        f"{architecture:8} {unit.name:7} {widths} {use.kernel:16} {use.registers:4} registers, "
        f"{shared:6} bytes shared{held}, {use.stack} bytes of stack"
    )


if __name__ == "__main__":
    dims = [int(word) for word in sys.argv[1:]] or [64, 80, 96, 112, 128, 192, 256]
    spilled = 0
    for unit, arch, use in compile_all(dims):
        spilled += use.stack > 0
        print(_describe(unit, arch, use), flush=True)
    sys.exit(f"{spilled} kernels spill" if spilled else 0)
