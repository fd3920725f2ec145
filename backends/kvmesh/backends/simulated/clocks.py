"""Which clock a simulation has."""

from pathlib import Path

from kvmesh.backends.architectures import load_shape
from kvmesh.backends.base import Simulation
from kvmesh.backends.devices.device import Device
from kvmesh.backends.devices.library import load_device
from kvmesh.backends.errors import DeviceError
from kvmesh.backends.simulated.gpu import gpu_clock
from kvmesh.backends.simulated.split import split_clock
from kvmesh.backends.simulated.wrapper import StepClock


def clock_of(wanted: Simulation, path: Path, codec: str) -> StepClock:
    """The clock of a device for the checkpoint at `path`, or for the model it is timed as.

    Raises DeviceError, ShapeError, DoesNotFit or CheckpointError.
    """
    own = load_shape(str(path))
    timed = load_shape(wanted.model) if wanted.model else None
    device = _by_op(load_device(wanted.device))
    clock = gpu_clock(device, own, timed, wanted.count, wanted.weights, codec)
    return split_clock(clock, load_device(wanted.ffn_device)) if wanted.ffn_device else clock


def _by_op(device: Device) -> Device:
    if device.model == "cycle":
        raise DeviceError(
            f"device {device.name} is timed by its own simulator, not op by op; use backend lpu"
        )
    return device
