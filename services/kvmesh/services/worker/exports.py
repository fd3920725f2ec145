"""Which blocks go to the shards, and ended sequences that stay until theirs have gone. Pure."""

from collections.abc import Iterable

from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.worker.holdings import Holdings
from kvmesh.services.worker.sequence import Finish, Sequence


class Exports:
    """Offers each block of a sequence once. What leaving sequences hold is freed from here."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._leaving: dict[Sequence, None] = {}  # ended; their blocks are still to be exported

    @property
    def leaving(self) -> tuple[Sequence, ...]:
        return tuple(self._leaving)

    @property
    def handovers(self) -> list[Sequence]:
        """Ended prefills whose tail is still in its slot."""
        return [s for s in self._leaving if s.finish is Finish.HANDOVER]

    def choose(self, running: Iterable[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """Up to `budget` (sequence, block index) that shards do not have; all of a hand-over."""
        cache = self._holdings.cache
        chosen: list[tuple[Sequence, int]] = []
        for sequence in (*self._leaving, *running):
            whole = sequence.finish is Finish.HANDOVER
            stop = _export_stop(sequence)
            while sequence.next_export < stop and (whole or len(chosen) < budget):
                if cache.share(sequence.key(sequence.next_export)):
                    chosen.append((sequence, sequence.next_export))
                sequence.next_export += 1
        return chosen

    def leave(self, sequence: Sequence) -> None:
        """It has ended: frees it, once its blocks are exported and its tail is taken."""
        self._leaving[sequence] = None
        if sequence.finish is not Finish.HANDOVER:
            self._free_if_exported(sequence)

    def settle(self, force: bool) -> None:
        """Frees those whose exports are done, or with `force` given up."""
        for sequence in self.leaving:
            if force:
                self.give_up(sequence)
            else:
                self._free_if_exported(sequence)

    def give_up_one(self) -> bool:
        """Frees the first that is no hand-over, exported or not; whether there was one."""
        dispensable = next((s for s in self._leaving if s.finish is not Finish.HANDOVER), None)
        if dispensable is not None:
            self.give_up(dispensable)
        return dispensable is not None

    def give_up(self, sequence: Sequence) -> None:
        """Frees a leaving sequence, whatever of it is not exported."""
        del self._leaving[sequence]
        self._holdings.free(sequence)

    def _free_if_exported(self, sequence: Sequence) -> None:
        if sequence.next_export >= _export_stop(sequence):
            self.give_up(sequence)


def _export_stop(sequence: Sequence) -> int:
    """The index after the last block that may be exported now."""
    if not sequence.work.shards or not sequence.generated:
        return 0
    sealed = sequence.computed // BLOCK_SIZE
    if sequence.finish is not None:
        return sealed
    return min(sealed, sequence.work.num_prompt // BLOCK_SIZE)
