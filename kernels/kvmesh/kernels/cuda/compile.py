"""CUDA text to machine code with NVRTC, which needs neither a GPU nor a driver.

Machine code is kept under the user's cache folder, by digest of the text and by architecture.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.kernels.cuda.source import FOLDER, Unit

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
    if importlib.util.find_spec("cuda") is None:
        return "cuda-bindings cannot be imported; install kvmesh[cuda]"
    return None


def compile_unit(unit: Unit, architecture: str) -> Compiled:
    """Raises CompileError with NVRTC's log."""
    from cuda.bindings import nvrtc

    _, program = _checked(
        nvrtc.nvrtcCreateProgram(unit.text.encode(), b"unit.cu", 0, [], [])
    )
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
