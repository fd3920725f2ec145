"""Streams device memory: the bandwidth that there is."""

from typing import Any

import numpy as np

from kvmesh.kernels.cuda.device import Device
from kvmesh.kernels.cuda.occupancy import MOVE_THREADS
from kvmesh.kernels.cuda.source import Unit

UNIT = Unit("stream")
_LINE = 16  # bytes that a thread moves at a time
_MOST_BLOCKS = 4096  # enough threads to keep any device's memory busy


class Streams:
    """Reads and copies whole device arrays of uint8, a multiple of 16 bytes long."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._out = device.zeros((1,), np.uint32)

    def read(self, source: Any) -> None:
        lines = source.size // _LINE
        args = (source, np.int64(lines), self._out)
        self._device.launch(UNIT, "stream_read", _grid(lines), MOVE_THREADS, 0, args)

    def copy(self, target: Any, source: Any) -> None:
        """Raises ValueError if they differ in size."""
        if target.size != source.size:
            raise ValueError(f"{source.size} bytes over {target.size}")
        lines = source.size // _LINE
        args = (target, source, np.int64(lines))
        self._device.launch(UNIT, "stream_copy", _grid(lines), MOVE_THREADS, 0, args)


def _grid(lines: int) -> tuple[int, int, int]:
    return max(1, min(_MOST_BLOCKS, -(-lines // MOVE_THREADS))), 1, 1
