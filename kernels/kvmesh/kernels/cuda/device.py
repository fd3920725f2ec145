"""What the kernels' launchers need of a device: memory, copies and launches.

Arrays follow NumPy's rules for shape, dtype and basic slicing. Launches and copies happen in the
order they are asked for; `get` waits for them.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cuda.compile import ARCHITECTURES, cubin_path, missing
from kvmesh.kernels.cuda.source import Unit


class Device(Protocol):
    """A CUDA device, or what stands in for one."""

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """A C-contiguous array in device memory, 256-byte aligned."""
        ...

    def put(self, source: npt.NDArray[Any]) -> Any:
        """A copy in device memory of a host array."""
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

    def synchronize(self) -> None:
        """Returns when all that was asked for is done."""
        ...


class CupyDevice:
    """A real GPU through CuPy. Raises ImportError without CuPy, CuPy's errors without a GPU."""

    def __init__(self, number: int = 0) -> None:
        cupy = importlib.import_module("cupy")
        self._cupy = cupy
        self._device = cupy.cuda.Device(number)
        self._device.use()
        self.architecture = architecture_of(self._device.compute_capability)
        self._modules: dict[Unit, Any] = {}
        self._shared: set[tuple[Unit, str, int]] = set()

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        return self._cupy.zeros(shape, dtype)

    def put(self, source: npt.NDArray[Any]) -> Any:
        return self._cupy.asarray(source)

    def get(self, array: Any) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = self._cupy.asnumpy(array)
        return host

    def pointer(self, array: Any) -> int:
        return int(array.data.ptr)

    def launch(
        self, unit: Unit, kernel: str, grid: tuple[int, int, int], threads: int, shared_bytes: int,
        args: Sequence[Any],
    ) -> None:  # fmt: skip
        if unit not in self._modules:
            path = cubin_path(unit, self.architecture)
            self._modules[unit] = self._cupy.RawModule(path=str(path))
        function = self._modules[unit].get_function(kernel)
        if (unit, kernel, shared_bytes) not in self._shared:
            # Above 48 KiB a kernel has to ask.
            function.max_dynamic_shared_size_bytes = shared_bytes
            self._shared.add((unit, kernel, shared_bytes))
        null = np.uint64(0)
        given = tuple(null if arg is None else arg for arg in args)
        function(grid, (threads, 1, 1), given, shared_mem=shared_bytes)

    def synchronize(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()


def unavailable_reason() -> str | None:
    """None if the kernels run on a GPU of this machine, else why not, with the next step."""
    lacking = missing()
    if lacking is not None:
        return lacking
    if importlib.util.find_spec("cupy") is None:
        return "cupy cannot be imported; install kvmesh[cuda]"
    try:
        name = CupyDevice().architecture
    except Exception as error:  # CuPy's classes, and the driver's behind them
        return f"no usable GPU: {type(error).__name__}: {error}"
    if len(name) == len(ARCHITECTURES[0]) and name < ARCHITECTURES[0]:
        return f"this GPU is {name}, the kernels need {ARCHITECTURES[0]} or newer"
    return None


def architecture_of(compute_capability: str) -> str:
    """NVRTC's name of an architecture: '90' to sm_90a. Machine code with an `a` fits that one."""
    number = int(compute_capability)
    return f"sm_{number}a" if number >= 90 else f"sm_{number}"
