"""Runs the stages of a model in ONNX Runtime on buffers that are allocated once.

A binding ties a session to buffers of one token count. Making the bindings costs about as much as
running them, so those of recent token counts are kept.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvmesh.backends.arrays import HostMemory
from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.loader import Checkpoint
from kvmesh.backends.models.rope import rope_tables
from kvmesh.kernels.cuda.device import Place

_KEPT_TOKEN_COUNTS = 128
_WARNINGS_OFF = 3  # ONNX Runtime's level for errors only

Provider = str | tuple[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """threads: of one operator. spin: busy-wait between operators, for a machine of one's own.

    providers: of ONNX Runtime, the preferred first.
    """

    threads: int = 1
    spin: bool = False
    providers: tuple[Provider, ...] = ("CPUExecutionProvider",)


class Memory(Protocol):
    """Where the buffers lie; as kernels.cuda.device.Device has it."""

    @property
    def place(self) -> Place: ...

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any: ...

    def put(self, source: npt.NDArray[Any]) -> Any: ...

    def pointer(self, array: Any) -> int: ...


def open_session(model: bytes, root: Path, options: SessionOptions) -> ort.InferenceSession:
    """A session over a serialised model whose external data is relative to `root`."""
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
    return ort.InferenceSession(model, settings, providers=list(options.providers))


class StageGraphs:
    """The stages of one checkpoint as sessions, and the buffers between them in one memory.

    Shapes, for a capacity of N tokens: ids int64 [N], positions int64 [N, 1], q and attention fp32
    [N, Hq, D], k and v fp32 [N, Hkv, D]. Raises CheckpointError if ONNX Runtime refuses a stage.
    """

    def __init__(
        self, checkpoint: Checkpoint, max_tokens: int, options: SessionOptions, memory: Memory
    ) -> None:
        config = checkpoint.config
        self.vocab_size = config.vocab_size
        self.last = config.num_layers
        self._memory = memory
        kv_shape = (max_tokens, config.num_kv_heads, config.head_dim)
        q_shape = (max_tokens, config.num_heads, config.head_dim)
        self.ids = memory.zeros((max_tokens,), np.int64)
        self.positions = memory.zeros((max_tokens, 1), np.int64)
        self.q = memory.zeros(q_shape, np.float32)
        self.k = memory.zeros(kv_shape, np.float32)
        self.v = memory.zeros(kv_shape, np.float32)
        self.attention = memory.zeros(q_shape, np.float32)
        # A stage reads one and writes the other.
        self._hidden = [
            memory.zeros((max_tokens, config.hidden_size), np.float32) for _ in range(2)
        ]
        tables = rope_tables(config.rope, config.head_dim, config.max_context)
        self._rope = [memory.put(table) for table in tables]
        try:
            self.sessions = [
                open_session(checkpoint.stage(stage), checkpoint.root, options)
                for stage in range(config.num_layers + 1)
            ]
        except Exception as error:  # ONNX Runtime raises classes without a common root of its own
            raise CheckpointError(f"{checkpoint.root}: ONNX Runtime refuses it: {error}") from error

    def bind(self, stage: int, rows: slice) -> ort.IOBinding:
        """A binding of the stage to those rows of the buffers; of the last one, without the rows
        wanted and the logits."""
        tokens = rows.stop - rows.start
        flat = (tokens, -1)
        binding = self.sessions[stage].io_binding()
        if stage == 0:
            self.attach(binding.bind_input, "ids", self.ids[rows])
        else:
            self.attach(binding.bind_input, "attention", self.attention[rows].reshape(flat))
            self.attach(binding.bind_input, "hidden_in", self._hidden[(stage - 1) % 2][rows])
        if stage == self.last:
            return binding
        self.attach(binding.bind_input, "positions", self.positions[rows])
        self.attach(binding.bind_input, "rope_cos", self._rope[0])
        self.attach(binding.bind_input, "rope_sin", self._rope[1])
        self.attach(binding.bind_output, "hidden", self._hidden[stage % 2][rows])
        self.attach(binding.bind_output, "q", self.q[rows].reshape(tokens, 1, -1))
        self.attach(binding.bind_output, "k", self.k[rows].reshape(tokens, 1, -1))
        self.attach(binding.bind_output, "v", self.v[rows].reshape(flat))
        return binding

    def attach(self, bind: Any, name: str, array: Any) -> None:
        """bind: bind_input or bind_output of a binding; `array` must outlive it."""
        # A view into a preallocated buffer: ONNX Runtime gets the address and keeps no reference.
        place, address = self._memory.place, self._memory.pointer(array)
        bind(name, place.kind, place.number, array.dtype.type, array.shape, address)

    def close(self) -> None:
        """Frees the sessions with their weights. Twice is safe."""
        self.sessions.clear()


class StagePipeline:
    """The stages on the CPU.

    Before stage 0 the caller fills `buffers.ids` and `buffers.positions`; after each stage but the
    last it reads q, k, v and writes attention.
    """

    def __init__(self, checkpoint: Checkpoint, max_tokens: int, options: SessionOptions) -> None:
        self.buffers = StageGraphs(checkpoint, max_tokens, options, HostMemory())
        self._bindings: OrderedDict[int, list[ort.IOBinding]] = OrderedDict()

    def run(self, stage: int, tokens: int) -> None:
        """Runs a stage before the last on the first `tokens` rows of the buffers."""
        self.buffers.sessions[stage].run_with_iobinding(self._bound(tokens)[stage])

    def logits(self, tokens: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs the last stage for the wanted rows. Returns a new fp32 [len(rows), vocab_size]."""
        graphs = self.buffers
        binding = self._bound(tokens)[graphs.last]
        logits = np.empty((len(rows), graphs.vocab_size), np.float32)
        if len(rows):
            graphs.attach(binding.bind_input, "rows", rows)
            graphs.attach(binding.bind_output, "logits", logits)
            graphs.sessions[graphs.last].run_with_iobinding(binding)
        return logits

    def close(self) -> None:
        """Frees the sessions with their weights. Twice is safe."""
        self._bindings.clear()
        self.buffers.close()

    def _bound(self, tokens: int) -> list[ort.IOBinding]:
        bindings = self._bindings.get(tokens)
        if bindings is not None:
            self._bindings.move_to_end(tokens)
            return bindings
        rows = slice(0, tokens)
        bindings = [self.buffers.bind(stage, rows) for stage in range(self.buffers.last + 1)]
        self._bindings[tokens] = bindings
        if len(self._bindings) > _KEPT_TOKEN_COUNTS:
            self._bindings.popitem(last=False)
        return bindings
