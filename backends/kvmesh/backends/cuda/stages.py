"""The stages of a model on a device, in ONNX Runtime, ROWS tokens at a time.

A matrix product sums in an order that the library picks by shape. So every run has one shape: a row
then has the same bits alone, in company and however a prompt is cut. Up to ROWS tokens a product
is bound by reading its weights, so rows that stand for nothing cost little.
"""

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvmesh.backends.errors import BackendUnavailable
from kvmesh.backends.models.loader import Checkpoint
from kvmesh.backends.ort import Provider, SessionOptions, StageGraphs
from kvmesh.kernels.cuda.device import Device, Place

ROWS = 64
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


def providers(place: Place) -> tuple[Provider, ...]:
    """ONNX Runtime's for a device: on its own stream, so that no run waits for another's.

    TF32 is off: it keeps 10 bits of fp32's fraction.
    """
    if place.kind == "cpu":
        return (_CPU,)
    options = {
        "device_id": str(place.number),
        "user_compute_stream": str(place.stream),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    return ((_CUDA, options), _CPU)


class DeviceStages:
    """The stages, and the buffers that attention reads (q, k, v) and writes (attention)."""

    def __init__(
        self, device: Device, checkpoint: Checkpoint, max_tokens: int, options: SessionOptions
    ) -> None:
        self._device = device
        self._chunks = -(-max_tokens // ROWS)
        self._graphs = StageGraphs(checkpoint, self._chunks * ROWS, options, device)
        self._check_providers()
        self.qkv = self._graphs.q, self._graphs.k, self._graphs.v
        self.attention = self._graphs.attention
        self._rows = device.zeros((ROWS,), np.int64)
        self._logits = device.zeros((ROWS, self._graphs.vocab_size), np.float32)
        self._bindings = [
            [
                self._graphs.bind(stage, slice(at * ROWS, (at + 1) * ROWS))
                for stage in range(self.last)
            ]
            for at in range(self._chunks)
        ]
        self._head = self._graphs.bind(self.last, slice(0, self._chunks * ROWS))
        self._graphs.attach(self._head.bind_input, "rows", self._rows)
        self._graphs.attach(self._head.bind_output, "logits", self._logits)
        self._run_options = ort.RunOptions()
        # What reads a result waits for the stream; a run need not.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    @property
    def last(self) -> int:
        return self._graphs.last

    def load(self, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> None:
        """The tokens of the next step. The rows behind them keep what they had."""
        self._device.write(self._graphs.ids[: len(ids)], ids)
        self._device.write(self._graphs.positions[: len(ids)], positions[:, None])

    def run(self, stage: int, tokens: int) -> None:
        """Runs a stage before the last."""
        session = self._graphs.sessions[stage]
        for at in range(-(-tokens // ROWS)):
            session.run_with_iobinding(self._bindings[at][stage], self._run_options)

    def logits(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs the last stage for the wanted rows. Returns a new fp32 [len(rows), vocab_size]."""
        found = np.empty((len(rows), self._graphs.vocab_size), np.float32)
        for at in range(0, len(rows), ROWS):
            some = rows[at : at + ROWS]
            padded = np.zeros(ROWS, np.int64)
            padded[: len(some)] = some
            self._device.write(self._rows, padded)
            self._graphs.sessions[self.last].run_with_iobinding(self._head, self._run_options)
            found[at : at + ROWS] = self._device.get(self._logits[: len(some)])
        return found

    def close(self) -> None:
        """Frees the sessions with their weights. Twice is safe."""
        self._bindings.clear()
        self._graphs.close()

    def _check_providers(self) -> None:
        """ONNX Runtime falls back to the CPU without a word in its result."""
        used = self._graphs.sessions[0].get_providers()
        if self._device.place.kind == "cuda" and _CUDA not in used:
            self._graphs.close()
            reason = (
                f"ONNX Runtime cannot use the GPU and took {', '.join(used)}; it needs the "
                "libraries of CUDA 13 and cuDNN 9: install kvmesh[cuda]"
            )
            raise BackendUnavailable(f"backend 'cuda' cannot run here: {reason}", {"cuda": reason})
