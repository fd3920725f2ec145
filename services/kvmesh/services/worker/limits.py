"""How much a worker takes on, what it planned for a step, and what it counted. Pure."""

from dataclasses import dataclass, replace

from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.errors import InvalidRequest
from kvmesh.services.worker.sequence import Sequence, Work


@dataclass(frozen=True, slots=True)
class Limits:
    """slots: sequences that run at once. step_tokens: most tokens of one step.

    prefill_chunk: most prompt tokens of a step in which others decode. adopt_blocks: cached blocks
    verified or imported per step.
    """

    slots: int
    num_blocks: int
    max_context: int
    max_waiting: int = 256
    step_tokens: int = 512
    prefill_chunk: int = 256
    adopt_blocks: int = 16

    @property
    def max_tokens(self) -> int:
        """Tokens that a sequence may have, prompt and output together."""
        return min(self.max_context, self.num_blocks * BLOCK_SIZE)

    def check(self, work: Work) -> None:
        """Raises InvalidRequest for work that can never run under these limits."""
        size = len(work.token_ids)
        if not 0 < work.num_prompt <= size:
            raise InvalidRequest(f"num_prompt_tokens is {work.num_prompt}, must be in 1..{size}")
        if size >= self.max_context:
            raise InvalidRequest(
                f"{size} tokens leave no room for output in a context of {self.max_context}"
            )
        needed = -(-(size + 1) // BLOCK_SIZE)
        if needed > self.num_blocks:
            raise InvalidRequest(
                f"{size} tokens need {needed} blocks, this worker has {self.num_blocks}"
            )
        most = work.settings.max_tokens
        if most is not None and size - work.num_prompt >= most:
            raise InvalidRequest(
                f"{size - work.num_prompt} output tokens are given, max_tokens is {most}"
            )


@dataclass(slots=True)  # not frozen: one is made for every token
class Planned:
    """Tokens [start, start + count) of a sequence; with `want_logits` the next one is chosen."""

    sequence: Sequence
    start: int
    count: int
    want_logits: bool


@dataclass(slots=True)
class Counters:
    """Since the process started. checksum_failures: blocks and tails that did not verify.

    batched: sequences, summed over steps. batch: of the last step alone.
    prefix_tokens, prefix_hits: prompt tokens of new requests, and those found in the cache.
    """

    preemptions: int = 0
    checksum_failures: int = 0
    tokens_generated: int = 0
    tokens_prefilled: int = 0
    steps: int = 0
    batched: int = 0
    batch: int = 0
    prefix_tokens: int = 0
    prefix_hits: int = 0

    def copy(self) -> "Counters":
        return replace(self)
