"""What running sequences hold of the device: blocks of the pool, and a slot each. Pure."""

from collections.abc import Iterable

from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.worker.blocks import BlockCache
from kvmesh.services.worker.limits import Limits
from kvmesh.services.worker.sequence import Sequence


class Holdings:
    """Gives blocks and slots out and takes them back. The cache may be used besides."""

    def __init__(self, limits: Limits) -> None:
        self.cache = BlockCache(limits.num_blocks)
        self._num_slots = min(limits.slots, limits.step_tokens)
        self._slots = list(range(self._num_slots - 1, -1, -1))

    def room_for(self, sequence: Sequence) -> list[int] | None:
        """The cached blocks that it would share if it ran now; None if there is no room."""
        if not self._slots:
            return None
        local = self.cache.match(sequence.usable_keys)
        fresh = sequence.blocks_to_run - len(local)
        return local if self.cache.can_allocate(fresh, keeping=local) else None

    def give(self, sequence: Sequence, local: list[int]) -> None:
        """A slot, the cached blocks that `room_for` named, and new ones for the rest."""
        fresh = sequence.blocks_to_run - len(local)
        self.cache.acquire(local)
        sequence.hold(local + self.cache.allocate(fresh))
        sequence.slot = self._slots.pop()

    def seal(self, sequence: Sequence, first: int, block_s: float) -> None:
        """Makes its blocks from `first` on known that are computed in full.

        block_s: device seconds that sealing each took.
        """
        stop = sequence.computed // BLOCK_SIZE
        if stop > first:
            self.cache.seal_all(sequence.blocks[first:stop], sequence.keys(first, stop))
            sequence.note_seals(stop - first, block_s * (stop - first))

    def free(self, sequence: Sequence) -> None:
        """Takes back all that it holds."""
        self.cache.release(sequence.blocks)
        sequence.blocks = []
        if sequence.slot is not None:
            self._slots.append(sequence.slot)
            sequence.slot = None

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raises AssertionError naming what does not fit together."""
        self.cache.check_integrity()
        holders = list(holders)
        slots = [s.slot for s in holders if s.slot is not None] + self._slots
        assert len(slots) == len(set(slots)), "a slot is used twice"
        assert len(slots) == self._num_slots, f"{len(slots)} of {self._num_slots} slots"
        held = sum(len(s.blocks) for s in holders)
        assert self.cache.num_references == held, "references without a holder"
