"""Decode steps whose launches are recorded once for each size and then replayed: CUDA graphs.

A recorded launch keeps its addresses, scalars and grid, so it is made for the largest step of a
size, and what differs from step to step is read from device memory (`plan.PlanBuffer`).
"""

import logging
from collections.abc import Callable
from typing import Any

from kvmesh.kernels.cuda.device import Device
from kvmesh.kernels.cuda.plan import HostPlan, PlanBuffer, Splitting, decode_grid, grid_of
from kvmesh.kernels.cuda.step import StepKernels

logger = logging.getLogger(__name__)

MOST_TOKENS = 64  # of a recorded step; a larger one keeps the device busy longer than its launches
_LEAST_WIDTH = 8  # blocks of the narrowest table


class DecodeGraphs:
    """The recorded attention of every layer, by size of step.

    A step has a recording if all its pieces are short (a decode token, or a few to verify), it
    fills no block and it has at most MOST_TOKENS tokens. Tokens and table width are rounded up to
    powers of two. kernels: for these steps alone, as recorded addresses must stay. qkv, out: the
    buffers that every step uses.
    """

    def __init__(
        self, device: Device, kernels: StepKernels, qkv: tuple[Any, Any, Any], out: Any,
        splitting: Splitting,
    ) -> None:  # fmt: skip
        self._device, self._kernels, self._splitting = device, kernels, splitting
        self._arrays = (qkv, out)
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self.refusal: str | None = None  # why the device records nothing, once it did not
        kernels.reserve(decode_grid(MOST_TOKENS, 1, splitting), int(qkv[0].shape[1]))

    def load(self, plan: HostPlan) -> Callable[[int], None] | None:
        """Makes `plan` the next step; the result runs one layer of it. None: it has no recording.

        The first step of a size is launched as it is, which loads the kernels; the second records.
        """
        if self.refusal is not None:
            return None
        step = grid_of(plan)
        if step.prefill or step.filled or step.tokens > MOST_TOKENS:
            return None
        size = _power_of_two(step.tokens), max(_LEAST_WIDTH, _power_of_two(step.table_width))
        recorded = self._recorded.get(size)
        if recorded is None:
            buffer = PlanBuffer(self._device, decode_grid(*size, self._splitting))
            recorded = self._recorded[size] = _Recorded(buffer)
        recorded.buffer.load(plan)
        return lambda layer: self._run(recorded, layer)

    def _run(self, recorded: "_Recorded", layer: int) -> None:
        def launch() -> None:
            qkv, out = self._arrays
            self._kernels.run_layer(recorded.buffer.plan, layer, qkv, out)

        if layer not in recorded.launched or self.refusal is not None:
            recorded.launched.add(layer)
            launch()
            return
        if layer not in recorded.replays:
            try:
                recorded.replays[layer] = self._device.capture(launch)
            except Exception as error:  # CuPy's classes, and the driver's behind them
                self.refusal = f"{type(error).__name__}: {error}"
                logger.warning("steps are launched anew each time: %s", self.refusal)
                launch()
                return
        recorded.replays[layer]()


class _Recorded:
    """One size of step: its plan's memory, and the recording of each layer."""

    def __init__(self, buffer: PlanBuffer) -> None:
        self.buffer = buffer
        self.launched: set[int] = set()
        self.replays: dict[int, Callable[[], None]] = {}


def _power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()
