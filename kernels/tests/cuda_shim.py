"""A Device that runs the CUDA text on the CPU: built with g++ against cuda_shim.hpp."""

import ctypes
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cuda.device import DeviceFacts, Place
from kvmesh.kernels.cuda.source import FOLDER, KERNELS, Unit

HERE = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-w", "-DKVMESH_SHIM")
SHARED_LIMIT = 99 << 10  # bytes of one thread block on the smallest architecture


class ShimError(RuntimeError):
    """What a GPU would not survive: a divergent barrier, too much shared memory, a copy or an
    allocation while launches are being recorded."""


def build(name: str, text: str, kernels: Sequence[str], digest: str) -> Path:
    """A shared library with run_<kernel> for each kernel, unless it has been built before."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmesh" / "shim"
    header = (HERE / "cuda_shim.hpp").read_bytes()
    whole = sha256(b"\0".join((digest.encode(), text.encode(), header, repr(OPTIONS).encode())))
    path = cache / f"{name}-{whole.hexdigest()[:32]}.so"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    runs = "\n".join(
        f'extern "C" int run_{kernel}(const unsigned* grid, unsigned block, int reversed, '
        f"void** args) {{ return shim::launch({kernel}, grid, block, reversed, args); }}"
        for kernel in kernels
    )
    tail = 'extern "C" const char* shim_message() { return shim::message; }\n'
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        source, built = Path(folder) / "unit.cpp", Path(folder) / "unit.so"
        source.write_text(f"{text}\n{runs}\n{tail}")
        command = ["g++", *OPTIONS, f"-I{FOLDER}", f"-I{HERE}", str(source), "-o", str(built)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise ShimError(f"g++ refuses {name}:\n{made.stderr[:4000]}")
        built.replace(path)
    return path


# A library is loaded once in a process and has one set of fibers, whichever device launches.
_RUNNING = threading.Lock()


class ShimTimer:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        return last - first


class ShimDevice:
    """See kernels.cuda.device.Device. reversed_threads: the last thread of a block runs first."""

    place = Place("cpu")
    timer = ShimTimer()

    def __init__(self, reversed_threads: bool = False) -> None:
        self._reversed = reversed_threads
        self._libraries: dict[Unit, ctypes.CDLL] = {}
        self._recorded: list[Callable[[], None]] | None = None
        self.launches: list[str] = []

    def describe(self) -> DeviceFacts:
        return DeviceFacts("CUDA text on the CPU", "shim", free_bytes=1 << 30)

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        self._not_recording("an allocation")
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.zeros(size + 256, np.uint8)
        start = -raw.ctypes.data % 256
        return raw[start : start + size].view(dtype).reshape(shape)

    def put(self, source: npt.NDArray[Any]) -> npt.NDArray[Any]:
        copy = self.zeros(source.shape, source.dtype)
        copy[...] = source
        return copy

    def write(self, target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
        self._not_recording("a copy to the device")
        if (target.shape, target.dtype) != (source.shape, source.dtype):
            raise ShimError(f"{source.dtype}{source.shape} over {target.dtype}{target.shape}")
        if not target.flags.c_contiguous:
            raise ShimError(f"an array of shape {target.shape} is not C-contiguous")
        target[...] = source

    def get(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self._not_recording("a copy to the host")
        return array.copy()

    def pointer(self, array: npt.NDArray[Any]) -> int:
        return int(array.ctypes.data)

    def launch(
        self, unit: Unit, kernel: str, grid: tuple[int, int, int], threads: int, shared_bytes: int,
        args: Sequence[Any],
    ) -> None:  # fmt: skip
        if shared_bytes > SHARED_LIMIT:
            raise ShimError(f"{kernel} asks for {shared_bytes} bytes, {SHARED_LIMIT} are there")
        if min(grid) < 1:
            raise ShimError(f"{kernel} has an empty grid {grid}")
        run = partial(self._run, unit, kernel, (grid, threads), [_cell(arg) for arg in args])
        if self._recorded is not None:
            self._recorded.append(run)
        else:
            run()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        recorded: list[Callable[[], None]] = []
        self._recorded = recorded
        try:
            work()
        finally:
            self._recorded = None

        def replay(work: Callable[[], None]) -> None:  # work: keeps its arrays
            for run in recorded:
                run()

        return partial(replay, work)

    def _run(
        self, unit: Unit, kernel: str, shape: tuple[tuple[int, int, int], int], cells: list[Any]
    ) -> None:
        grid, threads = shape
        with _RUNNING:
            self.launches.append(kernel)
            library = self._library(unit)
            table = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
            run = getattr(library, f"run_{kernel}")
            if run((ctypes.c_uint * 3)(*grid), threads, int(self._reversed), table):
                library.shim_message.restype = ctypes.c_char_p
                raise ShimError(f"{kernel}: {library.shim_message().decode()}")

    def _not_recording(self, what: str) -> None:
        if self._recorded is not None:
            raise ShimError(f"{what} while launches are recorded")

    def _library(self, unit: Unit) -> ctypes.CDLL:
        if unit not in self._libraries:
            path = build(unit.name, unit.text, KERNELS[unit.name], unit.digest)
            self._libraries[unit] = ctypes.CDLL(str(path))
        return self._libraries[unit]


def _cell(arg: Any) -> Any:
    """Memory that holds the argument as the kernel expects it."""
    if arg is None:
        return ctypes.c_void_p(0)
    if isinstance(arg, np.ndarray):
        if not arg.flags.c_contiguous:
            raise ShimError(f"an array of shape {arg.shape} is not C-contiguous")
        return ctypes.c_void_p(arg.ctypes.data)
    types = {np.int32: ctypes.c_int32, np.int64: ctypes.c_int64, np.float32: ctypes.c_float}
    return types[type(arg)](arg.item())
