"""A model whose next token can be worked out by hand, but that knows only what its pool holds.

K and V of a token are its id, so the next token, (31 * sum of all ids + position) % vocab, comes
out right only if every block and tail that a sequence attends to holds the right bytes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.backends.base import DeviceInfo, Estimate, ModelSpec, Segment, StepTimes
from kvmesh.kernels import block
from kvmesh.kernels.errors import BlockError
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

LAYOUT = KvLayout(1, 1, 32, "fp32", b"fake model 12345")
VOCAB = 101
EOS = 7


def next_token(tokens: Sequence[int]) -> int:
    return (31 * sum(tokens) + len(tokens)) % VOCAB


def continuation(prompt: Sequence[int], count: int, eos: int | None = EOS) -> list[int]:
    """What greedy decoding says, up to and with `eos`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


class FakePool:
    def __init__(self, num_blocks: int, num_slots: int) -> None:
        self.layout = LAYOUT
        self.num_blocks = num_blocks
        self.num_slots = num_slots
        self.blocks = np.zeros((num_blocks, LAYOUT.block_bytes), np.uint8)
        self.tails = np.full((num_slots, 1, 2, BLOCK_SIZE, 1, 32), np.nan, np.float32)
        self.imported_blocks = 0
        self.imported_tails = 0

    def import_block(self, block_id: int, data: bytes | memoryview) -> None:
        block.verify(data, LAYOUT)
        self.blocks[block_id] = np.frombuffer(data, np.uint8)
        self.imported_blocks += 1

    def export_block(self, block_id: int) -> bytes:
        self.verify_block(block_id)
        return self.blocks[block_id].tobytes()

    def verify_block(self, block_id: int) -> None:
        block.verify(self.blocks[block_id], LAYOUT)

    def import_tail(self, slot: int, num_tokens: int, data: bytes | memoryview) -> None:
        tail = self.tails[slot, :, :, :num_tokens]
        if memoryview(data).nbytes != tail.nbytes:
            raise BlockError(f"{memoryview(data).nbytes} bytes, expected {tail.nbytes}")
        tail[...] = np.frombuffer(data, np.float32).reshape(tail.shape)
        self.imported_tails += 1

    def export_tail(self, slot: int, num_tokens: int) -> bytes:
        return self.tails[slot, :, :, :num_tokens].tobytes()

    def seal(self, block_id: int, ids: npt.NDArray[np.float32]) -> None:
        payload = np.zeros(LAYOUT.payload_bytes // 4, np.float32)
        payload[:BLOCK_SIZE] = ids
        start = LAYOUT.header_bytes
        self.blocks[block_id][start : start + LAYOUT.payload_bytes] = payload.view(np.uint8)
        block.finish(LAYOUT, self.blocks[block_id])

    def ids(self, block_id: int) -> npt.NDArray[np.float32]:
        """The tokens of a sealed block. Raises BlockError if it was never sealed or is corrupt."""
        self.verify_block(block_id)
        start = LAYOUT.header_bytes
        return self.blocks[block_id][start : start + 4 * BLOCK_SIZE].view(np.float32)


class FakeModel:
    """largest_step: most tokens of one forward so far. failing: forwards that are to raise."""

    def __init__(self, num_blocks: int = 64, num_slots: int = 8, max_context: int = 2048) -> None:
        self.pool = FakePool(num_blocks, num_slots)
        self.device = DeviceInfo("fake", "measured", "none")
        self.spec = ModelSpec("fake", VOCAB, max_context, (EOS,), 1, LAYOUT)
        self.forwards: list[list[tuple[int, int]]] = []  # (start, tokens) of each segment
        self.failing = 0
        self.closed = False
        self.last_step = StepTimes()

    def forward(self, segments: Sequence[Segment]) -> npt.NDArray[np.float32]:
        self.forwards.append([(s.start, len(s.token_ids)) for s in segments])
        if self.failing:
            self.failing -= 1
            raise RuntimeError("the device is on fire")
        assert len({s.slot for s in segments}) == len(segments), "a slot twice in a step"
        totals = [(self._advance(s), s.start + len(s.token_ids)) for s in segments]
        rows = [t for s, t in zip(segments, totals, strict=True) if s.want_logits]
        filled = sum(
            (s.start + len(s.token_ids)) // BLOCK_SIZE - s.start // BLOCK_SIZE for s in segments
        )
        self.last_step = StepTimes(0.01, 0.001 * filled, filled)
        logits = np.zeros((len(rows), VOCAB), np.float32)
        for row, (total, length) in zip(logits, rows, strict=True):
            row[:] = -np.arange(VOCAB) % 13
            row[int(31 * total + length) % VOCAB] = 20
        return logits

    def _advance(self, segment: Segment) -> float:
        sealed, done = divmod(segment.start, BLOCK_SIZE)
        assert len(segment.block_table) * BLOCK_SIZE >= segment.start + len(segment.token_ids)
        ids = [self.pool.ids(int(b)) for b in segment.block_table[:sealed]]
        tail = self.pool.tails[segment.slot, 0, :, :, 0, 0]
        ids += [tail[0, :done], segment.token_ids.astype(np.float32)]
        tokens = np.concatenate(ids)
        for index in range(sealed, len(tokens) // BLOCK_SIZE):
            part = tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
            self.pool.seal(int(segment.block_table[index]), part)
        rest = tokens[len(tokens) // BLOCK_SIZE * BLOCK_SIZE :]
        tail[:] = np.nan
        tail[:, : len(rest)] = rest
        return float(tokens.sum())

    def estimate(self) -> Estimate:
        return Estimate()

    def close(self) -> None:
        self.closed = True
