"""Runs the stages of a model in ONNX Runtime on buffers that are allocated once.

A binding ties a session to buffers of one token count. Making the bindings costs about as much as
running them, so those of recent token counts are kept.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvmesh.backends.arrays import aligned_zeros
from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.loader import Checkpoint
from kvmesh.backends.models.rope import rope_tables

_KEPT_TOKEN_COUNTS = 128
_WARNINGS_OFF = 3  # ONNX Runtime's level for errors only


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """threads: of one operator. spin: busy-wait between operators, for a machine of one's own."""

    threads: int = 1
    spin: bool = False


def open_session(model: bytes, root: Path, options: SessionOptions) -> ort.InferenceSession:
    """A CPU session over a serialised model whose external data is relative to `root`."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = _WARNINGS_OFF
    for key, value in (
        ("session.intra_op.allow_spinning", "1" if options.spin else "0"),
        ("session.model_external_initializers_file_folder_path", str(root)),
    ):
        settings.add_session_config_entry(key, value)
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


class StagePipeline:
    """The stages of one checkpoint, and the buffers between them.

    Before stage 0 the caller fills `ids` and `positions`; after each stage but the last it reads
    `q`, `k`, `v` and writes `attention`. Shapes, for a capacity of N tokens: ids int64 [N],
    positions int64 [N, 1], q and attention fp32 [N, Hq, D], k and v fp32 [N, Hkv, D].
    """

    def __init__(self, checkpoint: Checkpoint, max_tokens: int, options: SessionOptions) -> None:
        config = checkpoint.config
        self._vocab_size = config.vocab_size
        self._last = config.num_layers
        kv_shape = (max_tokens, config.num_kv_heads, config.head_dim)
        q_shape = (max_tokens, config.num_heads, config.head_dim)
        self.ids = aligned_zeros((max_tokens,), np.int64)
        self.positions = aligned_zeros((max_tokens, 1), np.int64)
        self.q = aligned_zeros(q_shape, np.float32)
        self.k = aligned_zeros(kv_shape, np.float32)
        self.v = aligned_zeros(kv_shape, np.float32)
        self.attention = aligned_zeros(q_shape, np.float32)
        # A stage reads one and writes the other.
        self._hidden = [
            aligned_zeros((max_tokens, config.hidden_size), np.float32) for _ in range(2)
        ]
        self._rope = rope_tables(config.rope, config.head_dim, config.max_context)
        self._bindings: OrderedDict[int, list[ort.IOBinding]] = OrderedDict()
        try:
            self._sessions = [
                open_session(checkpoint.stage(stage), checkpoint.root, options)
                for stage in range(config.num_layers + 1)
            ]
        except Exception as error:  # ONNX Runtime raises classes without a common root of its own
            raise CheckpointError(f"{checkpoint.root}: ONNX Runtime refuses it: {error}") from error

    def run(self, stage: int, tokens: int) -> None:
        """Runs a stage before the last on the first `tokens` rows of the buffers."""
        self._sessions[stage].run_with_iobinding(self._bound(tokens)[stage])

    def logits(self, tokens: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs the last stage for the wanted rows. Returns a new fp32 [len(rows), vocab_size]."""
        binding = self._bound(tokens)[self._last]
        logits = np.empty((len(rows), self._vocab_size), np.float32)
        if len(rows):
            _bind(binding.bind_input, "rows", rows)
            _bind(binding.bind_output, "logits", logits)
            self._sessions[self._last].run_with_iobinding(binding)
        return logits

    def close(self) -> None:
        """Frees the sessions with their weights. Twice is safe."""
        self._bindings.clear()
        self._sessions.clear()

    def _bound(self, tokens: int) -> list[ort.IOBinding]:
        bindings = self._bindings.get(tokens)
        if bindings is not None:
            self._bindings.move_to_end(tokens)
            return bindings
        bindings = [self._bind_stage(stage, tokens) for stage in range(self._last + 1)]
        self._bindings[tokens] = bindings
        if len(self._bindings) > _KEPT_TOKEN_COUNTS:
            self._bindings.popitem(last=False)
        return bindings

    def _bind_stage(self, stage: int, tokens: int) -> ort.IOBinding:
        flat = (tokens, -1)
        binding = self._sessions[stage].io_binding()
        if stage == 0:
            _bind(binding.bind_input, "ids", self.ids[:tokens])
        else:
            _bind(binding.bind_input, "attention", self.attention[:tokens].reshape(flat))
            _bind(binding.bind_input, "hidden_in", self._hidden[(stage - 1) % 2][:tokens])
        if stage == self._last:
            return binding
        _bind(binding.bind_input, "positions", self.positions[:tokens])
        _bind(binding.bind_input, "rope_cos", self._rope[0])
        _bind(binding.bind_input, "rope_sin", self._rope[1])
        _bind(binding.bind_output, "hidden", self._hidden[stage % 2][:tokens])
        _bind(binding.bind_output, "q", self.q[:tokens].reshape(tokens, 1, -1))
        _bind(binding.bind_output, "k", self.k[:tokens].reshape(tokens, 1, -1))
        _bind(binding.bind_output, "v", self.v[:tokens].reshape(flat))
        return binding


def _bind(method: Callable[..., None], name: str, array: npt.NDArray[np.generic]) -> None:
    # A view into a preallocated buffer: ONNX Runtime gets the address and keeps no reference.
    method(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
