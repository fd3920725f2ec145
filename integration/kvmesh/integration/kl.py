"""What a codec changes in a model's next-token distribution, on the path that decoding takes.

Every token of a sequence is fed alone, as decoding does, with the true next token after it whatever
the model would have said (teacher forcing). Each step's logits are compared with those of the same
model under codec fp16. Only positions behind the first block are compared: the ones in it attend to
nothing that has been compressed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvmesh.backends.base import Model, ModelOptions, Segment
from kvmesh.backends.models.codec_check import Loss
from kvmesh.backends.registry import open_model
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

REFERENCE = "fp16"
BATCH = 16  # sequences that decode at once

Tokens = Sequence[int]
Progress = Callable[[int], None]  # gets the number of tokens that were fed


@dataclass(frozen=True, slots=True)
class Stored:
    """How K and V are stored: one codec, or one per layer."""

    codec: str
    layer_codecs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Divergence:
    """One entry per compared position: sequence by sequence, each from position 64 on.

    kl: fp64 [n], nats, KL(fp16 || codec). same_top: bool [n], whether the most likely token is the
    same. position: int64 [n], of the token that was fed. layout: what K and V were stored in.
    """

    kl: npt.NDArray[np.float64]
    same_top: npt.NDArray[np.bool_]
    position: npt.NDArray[np.int64]
    layout: KvLayout

    def loss(self) -> Loss:
        return Loss(
            kl_nats=float(self.kl.mean()),
            kl_p99_nats=float(np.quantile(self.kl, 0.99)),
            top1=float(self.same_top.mean()),
            bytes_per_token=bytes_per_token(self.layout),
        )

    def by_block(self) -> list[tuple[int, float]]:
        """(first position, mean KL) of each block of positions."""
        blocks = self.position // BLOCK_SIZE
        found = [int(block) for block in np.unique(blocks)]
        return [(block * BLOCK_SIZE, float(self.kl[blocks == block].mean())) for block in found]

    def by_sequence(self) -> list[float]:
        """Mean KL of each sequence, in order."""
        starts = np.flatnonzero(self.position == BLOCK_SIZE)
        return [float(part.mean()) for part in np.split(self.kl, starts[1:])]


def bytes_per_token(layout: KvLayout) -> int:
    """Of K and V in all layers with their scales; block headers are not counted."""
    return layout.payload_bytes // BLOCK_SIZE


def layer_bytes(layout: KvLayout) -> list[int]:
    """bytes_per_token, layer by layer."""
    planes = [layout.planes(layer) for layer in range(layout.num_layers)]
    return [(plane.end - plane.key_codes) // BLOCK_SIZE for plane in planes]


class KlBench:
    """Compares codecs of one checkpoint on the same sequences; the reference runs only once.

    scratch: a folder for the reference's logits, fp32 [compared positions, vocabulary].
    """

    def __init__(
        self, backend: str, path: Path, sequences: Sequence[Tokens], scratch: Path, threads: int = 1
    ) -> None:
        self._backend, self._path, self._threads = backend, path, threads
        self._sequences = [list(tokens) for tokens in sequences if len(tokens) > BLOCK_SIZE]
        if not self._sequences:
            raise ValueError(f"no sequence is longer than {BLOCK_SIZE} tokens: nothing to compare")
        self._scratch = scratch
        self._reference: npt.NDArray[np.float32] | None = None
        self._fingerprint = b""

    @property
    def num_tokens(self) -> int:
        """Fed in one measurement."""
        return sum(len(tokens) for tokens in self._sequences)

    @property
    def num_positions(self) -> int:
        """Compared in one measurement."""
        return self.num_tokens - BLOCK_SIZE * len(self._sequences)

    @property
    def fingerprint(self) -> bytes:
        """Of the model; empty before the first measurement."""
        return self._fingerprint

    def measure(self, stored: Stored, progress: Progress | None = None) -> Divergence:
        """Runs every sequence, and the reference before it if that has not run yet.

        Raises BackendError if the model cannot be opened so.
        """
        if self._reference is None:
            self._reference = self._run_reference(progress)
        kl, same = np.empty(self.num_positions), np.empty(self.num_positions, np.bool_)
        with closing(self._open(stored)) as model:
            layout = model.spec.layout
            for rows, logits in self._rows(model, progress):
                kl[rows], same[rows] = compare(self._reference[rows], logits)
        position = np.concatenate([np.arange(BLOCK_SIZE, len(s)) for s in self._sequences])
        return Divergence(kl, same, position, layout)

    def _run_reference(self, progress: Progress | None) -> npt.NDArray[np.float32]:
        with closing(self._open(Stored(REFERENCE))) as model:
            self._fingerprint = model.spec.layout.fingerprint
            shape = (self.num_positions, model.spec.vocab_size)
            kept = np.memmap(self._scratch / "reference.f32", np.float32, "w+", shape=shape)
            for rows, logits in self._rows(model, progress):
                kept[rows] = logits
        return kept

    def _open(self, stored: Stored) -> Model:
        longest = max(len(tokens) for tokens in self._sequences)
        batch = min(BATCH, len(self._sequences))
        options = ModelOptions(
            codec=stored.codec,
            layer_codecs=stored.layer_codecs,
            num_blocks=batch * math.ceil(longest / BLOCK_SIZE),
            num_slots=batch,
            max_step_tokens=max(batch, BLOCK_SIZE),
            threads=self._threads,
        )
        return open_model(self._backend, self._path, options)

    def _rows(
        self, model: Model, progress: Progress | None
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """(rows of the compared positions, their logits), step by step."""
        first = np.cumsum([0, *(len(tokens) - BLOCK_SIZE for tokens in self._sequences)])
        for fed, logits in decode_steps(model, self._sequences):
            if progress is not None:
                progress(len(fed))
            seen = [i for i, (_, position) in enumerate(fed) if position >= BLOCK_SIZE]
            if seen:
                rows = [int(first[fed[i][0]]) + fed[i][1] - BLOCK_SIZE for i in seen]
                yield np.array(rows, np.int64), logits[seen]


def decode_steps(
    model: Model, sequences: Sequence[Tokens]
) -> Iterator[tuple[list[tuple[int, int]], npt.NDArray[np.float32]]]:
    """Feeds each sequence token by token, as many at once as the model has slots.

    Yields after each step: (sequence, position) of every token fed, and the fp32 logits
    [len(fed), vocabulary] after each. The model must have blocks for `num_slots` of the longest.
    """
    longest = max(len(tokens) for tokens in sequences)
    width = math.ceil(longest / BLOCK_SIZE)
    slots = min(model.pool.num_slots, model.pool.num_blocks // width)
    ids = [np.asarray(tokens, np.int64) for tokens in sequences]
    for begin in range(0, len(ids), slots):
        batch = range(begin, min(begin + slots, len(ids)))
        for position in range(max(len(ids[s]) for s in batch)):
            running = [s for s in batch if position < len(ids[s])]
            segments = [
                Segment(
                    slot=s - begin,
                    start=position,
                    token_ids=ids[s][position : position + 1],
                    block_table=np.arange(width, dtype=np.int32) + (s - begin) * width,
                )
                for s in running
            ]
            yield [(s, position) for s in running], model.forward(segments)


def compare(
    reference: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(KL(reference || logits) in nats, same most likely token) of each row of fp32 [n, vocab]."""
    p, q = _log_softmax(reference), _log_softmax(logits)
    kl = (np.exp(p) * (p - q)).sum(-1)
    return np.maximum(kl, 0.0), reference.argmax(-1) == logits.argmax(-1)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs
