"""What a device must offer to run a model in the mesh.

Four nouns: DeviceInfo (what it is), Estimate (how long a step takes), BlockPool (where K and V
live), Model (tokens in, logits out). A worker is written against these alone; capabilities are
data, and nothing asks for a backend's name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvmesh.backends.errors import BackendUnavailable
from kvmesh.kernels.layout import KvLayout


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device as the mesh sees it, or `count` that act as one. Zero means: not known.

    price_per_hour: US dollars of one of the `count`; price_source: where that is from. All other
    figures are of all of them together. transfer_*: what it takes, on a simulated device, to bring
    KV to it: once, and for each byte of this model's KV.
    """

    name: str
    kind: Literal["measured", "simulated"]
    architecture: str
    memory_bytes: int = 0
    bandwidth_bytes_s: float = 0.0
    peak_flops: tuple[tuple[str, float], ...] = ()  # (dtype, FLOP/s)
    power_w: float = 0.0
    price_per_hour: float = 0.0
    price_source: str = ""
    count: int = 1
    transfer_byte_s: float = 0.0
    transfer_base_s: float = 0.0

    @property
    def simulated(self) -> bool:
        return self.kind == "simulated"


@dataclass(frozen=True, slots=True)
class StepShape:
    """The work of one step: what a step's seconds are a function of.

    The last four say the same in more detail; an Estimate does without them.
    """

    prefill_tokens: int = 0
    decode_sequences: int = 0
    context_tokens: int = 0  # sum over all query tokens of the tokens each attends to
    prefill_chunks: int = 0
    prefill_context: int = 0  # sum over chunks of the tokens read, the chunk's own included
    prefill_outputs: int = 0  # chunks whose logits are wanted
    decode_context: int = 0  # of context_tokens, those of decoding sequences

    @classmethod
    def of(cls, runs: Iterable[tuple[int, int, bool]]) -> Self:
        """runs: (position of the first token, tokens, whether logits are wanted) of each sequence;
        one token is a decode, more are a chunk of a prompt."""
        runs = list(runs)
        chunks = [run for run in runs if run[1] > 1]
        return cls(
            prefill_tokens=sum(count for _, count, _ in chunks),
            decode_sequences=sum(count == 1 for _, count, _ in runs),
            context_tokens=sum(
                count * start + count * (count + 1) // 2 for start, count, _ in runs
            ),
            prefill_chunks=len(chunks),
            prefill_context=sum(start + count for start, count, _ in chunks),
            prefill_outputs=sum(wanted for _, _, wanted in chunks),
            decode_context=sum(start + 1 for start, count, _ in runs if count == 1),
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a step, linear in its shape; the fields of kvmesh.v1.Estimate."""

    base_s: float = 0.002
    prefill_token_s: float = 1e-4
    decode_token_s: float = 5e-4
    context_token_s: float = 1e-8
    simulated: bool = False

    def seconds(self, shape: StepShape) -> float:
        return (
            self.base_s
            + self.prefill_token_s * shape.prefill_tokens
            + self.decode_token_s * shape.decode_sequences
            + self.context_token_s * shape.context_tokens
        )


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the time of one step went. Measured, but for what is named simulated.

    simulated_s: what the step would have taken on the device that is simulated; None if none is.
    simulated_idle_s: of that, the gap in which the device waits for its host.
    """

    total_s: float = 0.0
    seal_s: float = 0.0  # compressing and checksumming the blocks that filled
    sealed_blocks: int = 0
    simulated_s: float | None = None
    simulated_idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a checkpoint says of itself, as far as others need it."""

    name: str
    vocab_size: int
    max_context: int  # tokens, prompt and output together
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    layout: KvLayout  # carries the model fingerprint


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a simulated device is to be; the default is what the backend's name says.

    device: a device file's name, or a path to one. count: devices that act as one.
    model: a shape whose steps are timed instead of the checkpoint's, which still says the tokens.
    weights: format of the weights that are timed (architectures.WEIGHT_BYTES).
    ffn_device: another device that runs the FFN of each layer; `device` then does the rest.
    """

    device: str = ""
    count: int = 1
    model: str = ""
    weights: str = "bf16"
    ffn_device: str = ""


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a backend opens a checkpoint.

    layer_codecs: a codec for each layer instead of `codec`; empty if all have that one.
    num_blocks: sealed blocks in the pool; None lets the backend take `memory_fraction` of the
    device's free memory. num_slots: sequences that may hold an unfinished block at once.
    """

    codec: str = "k4v4"
    layer_codecs: tuple[str, ...] = ()
    num_blocks: int | None = None
    num_slots: int = 64
    max_step_tokens: int = 512  # most tokens of one forward, over all segments
    threads: int = 1
    spin: bool = False
    memory_fraction: float = 0.5
    simulation: Simulation = Simulation()

    def refuse_simulation(self, backend: str) -> None:
        """For a backend that measures. Raises BackendUnavailable if it is asked to simulate."""
        if self.simulation != Simulation():
            raise BackendUnavailable(
                f"backend {backend!r} measures, so it simulates no device; use backend simulated, "
                "blackwell or rubin"
            )


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence in one step: a prefill chunk, or one decode token.

    token_ids: int64 [n], the tokens at positions [start, start + n).
    block_table: int32 [>= ceil((start + n) / 64)], pool ids. Entries [0, start // 64) are sealed.
        The blocks that this segment fills up are sealed into their entries by the forward.
    slot: where the sequence's unfinished block lives in full precision; holds the K and V of
        positions [start // 64 * 64, start) before the forward.
    """

    slot: int
    start: int
    token_ids: npt.NDArray[np.int64]
    block_table: npt.NDArray[np.int32]
    want_logits: bool = True


@runtime_checkable
class BlockPool(Protocol):
    """Memory for sealed blocks and for the unfinished block (tail) of each running sequence.

    Knows nothing of who uses which block: ids are handed out by the worker's block table. Methods
    are called from one thread at a time.
    """

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_slots(self) -> int: ...

    def import_block(self, block_id: int, data: bytes | memoryview) -> None:
        """Copies a sealed block in. Raises kernels.errors.BlockError if it does not verify."""
        ...

    def export_block(self, block_id: int) -> bytes:
        """The sealed block's bytes. Raises kernels.errors.BlockError if it no longer verifies."""
        ...

    def verify_block(self, block_id: int) -> None:
        """Raises kernels.errors.BlockError if the block's bytes do not verify."""
        ...

    def import_tail(self, slot: int, num_tokens: int, data: bytes | memoryview) -> None:
        """Fills the first num_tokens of a slot; data is fp32 [layer][K, V][token][head][dim].

        Raises kernels.errors.BlockError for a wrong size.
        """
        ...

    def export_tail(self, slot: int, num_tokens: int) -> bytes: ...


@runtime_checkable
class Model(Protocol):
    """A model on a device. Calls come from one thread at a time."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def device(self) -> DeviceInfo: ...

    @property
    def pool(self) -> BlockPool: ...

    def forward(self, segments: Sequence[Segment]) -> npt.NDArray[np.float32]:
        """Runs one step: embedding to LM head, appending K and V, sealing each block that fills.

        Every token attends to the blocks before its own in sealed form and to its own block in
        full precision. A row of the result depends on its own sequence alone, bit for bit,
        whatever else is in the batch and however the prompt was cut into segments.

        Returns fp32 [number of segments with want_logits, vocab_size], in order: the logits after
        each such segment's last token. Raises ValueError for a segment that breaks its contract.
        """
        ...

    @property
    def last_step(self) -> StepTimes:
        """Of the forward that returned last; all zero before the first."""
        ...

    def estimate(self) -> Estimate:
        """Fitted from the steps so far, or the definition of time if simulated."""
        ...

    def close(self) -> None:
        """Frees device memory. Twice is safe."""
        ...


class Backend(Protocol):
    """Creates models on one kind of device. Registered under the entry point `kvmesh.backends`."""

    def probe(self) -> str | None:
        """None if this machine can run it, else the reason why not, with the next step."""
        ...

    def open(self, path: Path, options: ModelOptions) -> Model:
        """Loads a Hugging Face checkpoint folder.

        Raises backends.errors.CheckpointError naming the file that is missing, truncated or not
        supported.
        """
        ...
