"""Takes blocks and a tail that exist already into a sequence, a few per step. Pure.

Each is verified first: K and V that do not match their checksum are computed again, never
attended to. Verifying and copying many blocks takes longer than a decode step, hence the budget.
"""

from typing import Protocol

from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.worker.blocks import BlockCache
from kvmesh.services.worker.sequence import Fetched, Sequence


class PoolPort(Protocol):
    """What the scheduler needs of a block pool. False: the bytes do not verify."""

    def verify(self, block: int) -> bool: ...

    def import_block(self, block: int, data: bytes) -> bool: ...

    def import_tail(self, slot: int, num_tokens: int, data: bytes) -> bool: ...


class Adoption:
    """The progress of one sequence's adoption.

    num_local: its first blocks are cached ones of this pool. done: blocks taken so far.
    corrupt: a local block that does not verify, once met; the adoption cannot go on then.
    """

    def __init__(self, num_local: int, fetched: Fetched | None) -> None:
        self.num_local = num_local
        self.done = 0
        self.rejected = 0  # fetched blocks or tails that did not verify
        self.corrupt: int | None = None
        self._fetched = fetched or Fetched()

    def advance(self, sequence: Sequence, cache: BlockCache, pool: PoolPort, budget: int) -> int:
        """Takes up to `budget` blocks; how many it took. Fewer: adoption has ended."""
        taken = 0
        usable = len(sequence.usable_keys)
        while taken < budget and self.done < usable and self._take_next(sequence, cache, pool):
            self.done += 1
            taken += 1
        if taken < budget and self.corrupt is None:
            self._finish(sequence, pool)
        return taken

    def _take_next(self, sequence: Sequence, cache: BlockCache, pool: PoolPort) -> bool:
        block = sequence.blocks[self.done]
        if self.done < self.num_local:
            if pool.verify(block):
                return True
            self.corrupt = block
            return False
        data = self._fetched.blocks.get(self.done)
        if data is None:
            return False
        if not pool.import_block(block, data):
            self.rejected += 1
            return False
        cache.seal(block, sequence.key(self.done))
        cache.share(sequence.key(self.done))
        return True

    def _finish(self, sequence: Sequence, pool: PoolPort) -> None:
        sequence.computed = self.done * BLOCK_SIZE
        tail, slot = self._fetched.tail, sequence.slot
        if tail is None or slot is None or tail.start != sequence.computed:
            return
        if not 0 < tail.num_tokens < min(sequence.remaining, BLOCK_SIZE):
            return
        if pool.import_tail(slot, tail.num_tokens, tail.data):
            sequence.computed += tail.num_tokens
        else:
            self.rejected += 1
