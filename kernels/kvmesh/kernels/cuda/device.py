"""What the kernels' launchers need of a device: memory, copies, launches, recorded launches.

Arrays follow NumPy's rules for shape, dtype and basic slicing. Launches and copies happen in the
order they are asked for; `get` waits for them.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cuda.compile import ARCHITECTURES, cubin_path, missing
from kvmesh.kernels.cuda.source import Unit

_DRIVER = "install NVIDIA's driver so that nvidia-smi lists a GPU, or stay on the CPU"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device's memory is, for libraries that take addresses; stream 0 is the default."""

    kind: Literal["cuda", "cpu"]
    number: int = 0
    stream: int = 0


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a device says of itself. Zero means: it does not say.

    bandwidth_bytes_s: of the memory's clock and width, not measured.
    """

    name: str
    architecture: str
    memory_bytes: int = 0
    free_bytes: int = 0
    bandwidth_bytes_s: float = 0.0


class Timer(Protocol):
    """Time as it passes on the device."""

    def mark(self) -> Any:
        """A point between what was asked for before and what is asked for after."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks; waits for the last."""
        ...


class Device(Protocol):
    """A CUDA device, or what stands in for one."""

    @property
    def place(self) -> Place: ...

    @property
    def timer(self) -> Timer: ...

    def describe(self) -> DeviceFacts: ...

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """A C-contiguous array in device memory, 256-byte aligned."""
        ...

    def put(self, source: npt.NDArray[Any]) -> Any:
        """A copy in device memory of a host array."""
        ...

    def write(self, target: Any, source: npt.NDArray[Any]) -> None:
        """Copies a host array over a contiguous device array of the same shape and dtype."""
        ...

    def get(self, array: Any) -> npt.NDArray[Any]:
        """A copy in host memory, after all that was asked for before."""
        ...

    def pointer(self, array: Any) -> int:
        """The address of its first element, for libraries that take addresses."""
        ...

    def launch(
        self, unit: Unit, kernel: str, grid: tuple[int, int, int], threads: int, shared_bytes: int,
        args: Sequence[Any],
    ) -> None:  # fmt: skip
        """args: device arrays, None for a null pointer, and NumPy scalars of the kernel's types."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the launches of `work` without running them; the result runs them again.

        They keep the addresses, scalars and grids of now: what may change lies in device memory.
        `work` may only launch kernels that have run before. The result keeps `work`, and with it
        the arrays that it has.
        """
        ...


class CupyTimer:
    """CUDA events on one stream."""

    def __init__(self, cupy: Any, stream: Any) -> None:
        self._cupy, self._stream = cupy, stream

    def mark(self) -> Any:
        return self._stream.record()

    def seconds(self, first: Any, last: Any) -> float:
        last.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(first, last)) / 1e3


class CupyDevice:
    """A real GPU through CuPy, on a stream of its own. Any thread may call, one at a time.

    Raises ImportError without CuPy, CuPy's errors without a GPU.
    """

    def __init__(self, number: int = 0) -> None:
        cupy = importlib.import_module("cupy")
        self._cupy = cupy
        self._device = cupy.cuda.Device(number)
        self._architecture = architecture_of(self._device.compute_capability)
        with self._device:
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self._modules: dict[Unit, Any] = {}
        self._shared: set[tuple[Unit, str, int]] = set()
        self.place = Place("cuda", number, int(self._stream.ptr))
        self.timer = CupyTimer(cupy, self._stream)

    def describe(self) -> DeviceFacts:
        runtime = self._cupy.cuda.runtime
        name = runtime.getDeviceProperties(self._device.id)["name"]
        attributes = self._device.attributes
        clock_khz = attributes.get("MemoryClockRate", 0)
        width_bits = attributes.get("GlobalMemoryBusWidth", 0)
        with self._device:
            free, total = runtime.memGetInfo()
        return DeviceFacts(
            name=name.decode() if isinstance(name, bytes) else str(name),
            architecture=self._architecture,
            memory_bytes=int(total),
            free_bytes=int(free),
            bandwidth_bytes_s=2 * clock_khz * 1e3 * width_bits / 8,  # two transfers per cycle
        )

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        with self._device, self._stream:
            return self._cupy.zeros(shape, dtype)

    def put(self, source: npt.NDArray[Any]) -> Any:
        with self._device, self._stream:
            target = self._cupy.empty(source.shape, source.dtype)
            target.set(np.ascontiguousarray(source), stream=self._stream)
            return target

    def write(self, target: Any, source: npt.NDArray[Any]) -> None:
        with self._device, self._stream:
            target.set(np.ascontiguousarray(source), stream=self._stream)

    def get(self, array: Any) -> npt.NDArray[Any]:
        with self._device, self._stream:
            host: npt.NDArray[Any] = self._cupy.asnumpy(array, stream=self._stream)
            return host

    def pointer(self, array: Any) -> int:
        return int(array.data.ptr)

    def launch(
        self, unit: Unit, kernel: str, grid: tuple[int, int, int], threads: int, shared_bytes: int,
        args: Sequence[Any],
    ) -> None:  # fmt: skip
        with self._device, self._stream:
            if unit not in self._modules:
                path = cubin_path(unit, self._architecture)
                self._modules[unit] = self._cupy.RawModule(path=str(path))
            function = self._modules[unit].get_function(kernel)
            if (unit, kernel, shared_bytes) not in self._shared:
                # Above 48 KiB a kernel has to ask.
                function.max_dynamic_shared_size_bytes = shared_bytes
                self._shared.add((unit, kernel, shared_bytes))
            null = np.uint64(0)
            given = tuple(null if arg is None else arg for arg in args)
            function(grid, (threads, 1, 1), given, shared_mem=shared_bytes)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        with self._device, self._stream:
            self._stream.begin_capture()
            try:
                work()
            except BaseException:
                with suppress(Exception):  # CuPy's classes; the first error is the one to tell
                    self._stream.end_capture()
                raise
            graph = self._stream.end_capture()
        return partial(self._replay, graph, work)

    def _replay(self, graph: Any, work: Callable[[], None]) -> None:
        """work: not called; its arrays must live as long as the graph."""
        with self._device:
            graph.launch(self._stream)


def unavailable_reason() -> str | None:
    """None if the kernels run on a GPU of this machine, else why not, with the next step.

    Makes no context on the device.
    """
    lacking = missing()
    if lacking is not None:
        return lacking
    if importlib.util.find_spec("cupy") is None:
        return "cupy cannot be imported; install kvmesh[cuda]"
    try:
        cupy = importlib.import_module("cupy")
        if not cupy.cuda.runtime.getDeviceCount():
            return f"no GPU is here; {_DRIVER}"
        name = architecture_of(cupy.cuda.Device(0).compute_capability)
    except Exception as error:  # CuPy's classes, and the driver's behind them
        return f"no usable GPU: {type(error).__name__}: {error}; {_DRIVER}"
    if len(name) == len(ARCHITECTURES[0]) and name < ARCHITECTURES[0]:
        return f"this GPU is {name}, the kernels need {ARCHITECTURES[0]} or newer"
    return None


def architecture_of(compute_capability: str) -> str:
    """NVRTC's name of an architecture: '90' to sm_90a. Machine code with an `a` fits that one."""
    number = int(compute_capability)
    return f"sm_{number}a" if number >= 90 else f"sm_{number}"
