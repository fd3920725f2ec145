"""The work of one step: what its FLOPs, bytes and messages are linear functions of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True, slots=True)
class StepWork:
    """One rank's step: sums over its prefill chunks and its decoding sequences.

    prefill_attended: sum over prefill tokens of the tokens that each attends to.
    prefill_context: sum over chunks of the tokens whose K and V are read, the chunk's included.
    decode_context: sum over decoding sequences of the tokens in context, the new one included.
    prefill_outputs: chunks that end a prompt, and so need logits.
    windowed_*: the same three sums with each context cut at the model's window; None works them
        out from the means.
    """

    prefill_tokens: int = 0
    prefill_chunks: int = 0
    prefill_attended: int = 0
    prefill_context: int = 0
    prefill_outputs: int = 0
    decode_sequences: int = 0
    decode_context: int = 0
    windowed_attended: int | None = None
    windowed_prefill: int | None = None
    windowed_decode: int | None = None

    @classmethod
    def of(
        cls,
        chunks: Iterable[tuple[int, int]] = (),
        decodes: Sequence[int] = (),
        window: int | None = None,
        outputs: int | None = None,
    ) -> "StepWork":
        """chunks: (tokens before it, its tokens) of each prefill chunk; decodes: context of each
        decoding sequence, new token included; outputs: chunks that end a prompt [all]."""
        chunks = list(chunks)
        limit = window or (1 << 62)
        attended = windowed = 0
        for start, count in chunks:
            attended += attended_tokens(start, count)
            windowed += windowed_attended(start, count, limit)
        return cls(
            sum(count for _, count in chunks),
            len(chunks),
            attended,
            sum(start + count for start, count in chunks),
            len(chunks) if outputs is None else outputs,
            len(decodes),
            sum(decodes),
            windowed,
            sum(min(start, limit) + count for start, count in chunks),
            sum(min(context, limit) for context in decodes),
        )

    def divided(self, ranks: int) -> "StepWork":
        """An even share of it, rounded up."""
        if ranks == 1:
            return self

        def share(value: int) -> int:
            return -(-value // ranks)

        def maybe(value: int | None) -> int | None:
            return None if value is None else share(value)

        return StepWork(
            share(self.prefill_tokens),
            share(self.prefill_chunks),
            share(self.prefill_attended),
            share(self.prefill_context),
            share(self.prefill_outputs),
            share(self.decode_sequences),
            share(self.decode_context),
            maybe(self.windowed_attended),
            maybe(self.windowed_prefill),
            maybe(self.windowed_decode),
        )


def attended_tokens(start: int, count: int) -> int:
    """Sum over tokens [start, start + count) of the tokens that each attends to, itself too."""
    return count * start + count * (count + 1) // 2


def windowed_attended(start: int, count: int, window: int) -> int:
    """The same where each attends to the last `window` tokens at most."""
    growing = max(0, min(count, window - start))
    return attended_tokens(start, growing) + (count - growing) * window


class F(IntEnum):
    """What terms are linear in: the features of a step on the busiest rank."""

    TOKENS = 0
    DECODE = 1  # decode tokens, drafts included
    CHUNK_CONTEXT = 2  # tokens read by chunks
    ATTENDED = 3  # by tokens of chunks
    DECODE_CONTEXT = 4  # tokens read by decoding sequences
    W_CHUNK_CONTEXT = 5
    W_ATTENDED = 6
    W_DECODE_CONTEXT = 7
    LOGITS = 8  # rows of logits
    SEQUENCES = 9
    GROUP_TOKENS = 10  # tokens of all ranks that share the experts
    ASSIGNMENTS = 11  # (token, expert) pairs on the busiest rank
    EXPERTS = 12  # experts used there
    VISITS = 13  # tokens that come to the busiest rank from others
    ALL_REDUCE_S = 14  # seconds of one all-reduce of the step's activations
    ANY = 15  # 1 if the feature's kind of work is there, for floors and weights
    ANY_CHUNK = 16
    ANY_DECODE = 17
    ANY_LOGITS = 18
    SEALS = 19  # share of steps in which a block fills up


FEATURES = len(F)


def windowed(work: StepWork, window: int) -> tuple[float, float, float]:
    """(attended, read by chunks, read by decodes) of windowed layers: given, or from the means."""
    chunks, sequences = work.prefill_chunks, work.decode_sequences
    attended, read, decode = work.windowed_attended, work.windowed_prefill, work.windowed_decode
    if attended is None:
        attended = min(work.prefill_attended, work.prefill_tokens * window)
    if read is None:
        read = min(work.prefill_context, chunks * window + work.prefill_tokens)
    if decode is None:
        decode = min(work.decode_context, sequences * window)
    return attended, read, decode
