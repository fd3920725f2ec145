"""Devices that are not here: numbers by the CPU backend, time by a device file."""

import importlib
import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kvmesh.backends.base import Backend, Model, ModelOptions, Simulation
from kvmesh.backends.cpu.backend import CpuBackend
from kvmesh.backends.errors import BackendError, BackendUnavailable

logger = logging.getLogger(__name__)

DEFAULT_DEVICE = "b200"


class SimulatedBackend:
    """Any device file. device: what is simulated if the options name none."""

    def __init__(self, device: str = DEFAULT_DEVICE) -> None:
        self._device = device

    def probe(self) -> str | None:
        """As the CPU backend, which computes what the simulated device would."""
        return CpuBackend().probe()

    def open(self, path: Path, options: ModelOptions) -> Model:
        """Raises CheckpointError for a bad checkpoint; DeviceError, ShapeError or DoesNotFit for a
        simulation that cannot be; BackendUnavailable if probe() objects."""
        reason = self.probe()
        if reason is not None:
            raise BackendUnavailable(f"nothing can be simulated here: {reason}")
        from kvmesh.backends.cpu.model import CpuModel
        from kvmesh.backends.models.loader import load_checkpoint
        from kvmesh.backends.simulated.clocks import clock_of
        from kvmesh.backends.simulated.wrapper import SimulatedModel

        wanted = options.simulation
        wanted = replace(wanted, device=wanted.device or self._device)
        checkpoint = load_checkpoint(path)
        clock = clock_of(wanted, path, usual_codec(options))
        return SimulatedModel(CpuModel(checkpoint, options), clock)


class GpuFamily:
    """Runs on a real GPU of the family if there is one, else simulates `device`.

    capabilities: compute capabilities, without the dot. gpus: those of this machine's GPUs.
    cuda: the backend for real ones; may raise BackendUnavailable.
    """

    def __init__(
        self,
        device: str,
        capabilities: frozenset[str],
        gpus: Callable[[], Sequence[str]],
        cuda: Callable[[], Backend],
    ) -> None:
        self._simulated = SimulatedBackend(device)
        self._capabilities, self._gpus, self._cuda = capabilities, gpus, cuda

    def probe(self) -> str | None:
        return self.select(Simulation()).probe()

    def open(self, path: Path, options: ModelOptions) -> Model:
        """See SimulatedBackend.open, and the CUDA backend's."""
        return self.select(options.simulation).open(path, options)

    def select(self, wanted: Simulation) -> Backend:
        """The real thing, unless something else than the family itself is asked for."""
        if wanted != Simulation() or not self._capabilities.intersection(self._gpus()):
            return self._simulated
        try:
            cuda = self._cuda()
            reason = cuda.probe()
            if reason is None:
                return cuda
        except BackendError as error:
            reason = str(error)
        logger.warning("a GPU of this family is here but cannot be used, simulated: %s", reason)
        return self._simulated


def blackwell() -> GpuFamily:
    return GpuFamily("b200", frozenset({"100", "103"}), visible_gpus, _cuda)


def rubin() -> GpuFamily:
    return GpuFamily("rubin", frozenset({"107"}), visible_gpus, _cuda)


def visible_gpus() -> tuple[str, ...]:
    """Compute capabilities of the GPUs here, without the dot; none if CuPy or a driver is not."""
    if importlib.util.find_spec("cupy") is None:
        return ()
    try:
        cuda = importlib.import_module("cupy").cuda
        count = cuda.runtime.getDeviceCount()
        return tuple(str(cuda.Device(number).compute_capability) for number in range(count))
    except Exception as error:  # CuPy's classes, and the driver's behind them
        logger.info("no GPU can be asked: %s", error)
        return ()


def _cuda() -> Backend:
    from kvmesh.backends.registry import create_backend

    return create_backend("cuda")


def usual_codec(options: ModelOptions) -> str:
    """The codec of most layers: a clock knows one."""
    counts = Counter(options.layer_codecs).most_common(1)
    return counts[0][0] if counts else options.codec
