"""Which process holds which blocks: the longest held prefix of a prompt, per holder. Pure.

key -> bit mask of holders. A holder's life has one bit; when that life ends (restart, leave, new
snapshot) the bit is dead: it is masked out of every answer from then on, at once, and swept from
the entries a few at a time. So no event, however large the holder, stops the router.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

# Measured for CPython 3.11 with 1,000,000 entries: hash table and list node of OrderedDict, a
# key of 16 bytes, a mask of up to 30 holders.
BYTES_PER_ENTRY = 176
SWEEP_STEP = 256  # entries cleaned per call that changes the index

Applied = Literal["ok", "gap", "stale"]


class Events(Protocol):
    """The fields of kvmesh.v1.BlockEvents, which is one."""

    @property
    def incarnation(self) -> int: ...

    @property
    def sequence(self) -> int: ...

    @property
    def snapshot(self) -> bool: ...

    @property
    def stored(self) -> Sequence[bytes]: ...

    @property
    def removed(self) -> Sequence[bytes]: ...


@dataclass(slots=True)
class _Holder:
    incarnation: int
    shard: bool
    bit: int  # a mask with one bit set
    sequence: int | None = None  # of the last message; None: a snapshot must come first
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """What is held of one list of keys.

    local: worker -> length of the prefix that it holds. shard_run[i]: keys[i:i + shard_run[i]] are
    held by the shards together; ends where nothing is held any more.
    """

    local: dict[str, int]
    shard_run: tuple[int, ...]

    def remote_after(self, position: int) -> int:
        """How many keys from `position` on the shards hold without a break."""
        return self.shard_run[position] if position < len(self.shard_run) else 0


class PrefixIndex:
    """Keys that workers and shards said they hold, within `max_bytes`.

    When full, the entries that were least recently matched or stored go first; a block goes before
    its parent, as touching a prefix leaves the parent the more recent one.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_entries = max(1, max_bytes // BYTES_PER_ENTRY)
        self._masks: OrderedDict[bytes, int] = OrderedDict()
        self._holders: dict[str, _Holder] = {}
        self._names: dict[int, str] = {}  # bit -> holder
        self._live = 0
        self._shards = 0
        self._dead = 0  # bits of ended lives that entries may still carry
        self._sweeping = 0  # the dead bits that the sweep under way removes
        self._to_sweep: list[bytes] = []
        self.evicted = 0

    @property
    def entries(self) -> int:
        return len(self._masks)

    @property
    def num_bytes(self) -> int:
        return len(self._masks) * BYTES_PER_ENTRY

    def blocks_of(self, holder: str) -> int:
        known = self._holders.get(holder)
        return known.blocks if known is not None else 0

    def bit_of(self, holder: str, incarnation: int) -> int:
        """The mask of this life of the holder; 0 if it has ended."""
        known = self._holders.get(holder)
        return known.bit if known is not None and known.incarnation == incarnation else 0

    def add(self, holder: str, incarnation: int, shard: bool = False) -> None:
        """Begins a life of `holder`, empty; an earlier one ends."""
        self.remove(holder)
        known = _Holder(incarnation, shard, 0)
        self._holders[holder] = known
        self._take_bit(holder, known)

    def remove(self, holder: str) -> None:
        """All its entries are gone when this returns. Unknown holders are no error."""
        known = self._holders.pop(holder, None)
        if known is not None:
            self._drop_bit(known)

    def apply(self, holder: str, events: Events) -> Applied:
        """Takes one message of a holder.

        gap: a message before this one is missing; nothing is taken until a snapshot comes.
        stale: from a life of the holder that is not the present one; ignored.
        """
        known = self._holders.get(holder)
        if known is None or known.incarnation != events.incarnation:
            return "stale"
        if events.snapshot:
            if known.blocks:
                self._drop_bit(known)
                self._take_bit(holder, known)
        elif known.sequence is None or events.sequence != known.sequence + 1:
            known.sequence = None
            return "gap"
        known.sequence = events.sequence
        self._remove_keys(known, events.removed)
        self._store_keys(known, events.stored)
        self._sweep()
        return "ok"

    def match(self, keys: Sequence[bytes], soon: Sequence[int] = ()) -> Match:
        """What is held of the prefix `keys`, which counts as used now.

        soon: masks of holders that will hold keys[i] shortly, beside those that do.
        """
        masks = self._masks
        live = self._live
        found: list[int] = []
        for position, key in enumerate(keys):
            mask = masks.get(key, 0) & live
            if position < len(soon):
                mask |= soon[position] & live
            if not mask:
                break
            found.append(mask)
        touch = masks.move_to_end
        for key in reversed(keys[: len(found)]):
            if key in masks:
                touch(key)
        return Match(self._local(found), self._runs(found))

    def _local(self, found: list[int]) -> dict[str, int]:
        lengths: dict[str, int] = {}
        holding = self._live & ~self._shards
        for position, mask in enumerate(found):
            ended = holding & ~mask
            if ended:
                self._note(lengths, ended, position)
                holding &= mask
                if not holding:
                    break
        self._note(lengths, holding, len(found))
        return lengths

    def _note(self, lengths: dict[str, int], bits: int, length: int) -> None:
        while bits:
            bit = bits & -bits
            lengths[self._names[bit]] = length
            bits ^= bit

    def _runs(self, found: list[int]) -> tuple[int, ...]:
        shards = self._shards
        run = 0
        runs: list[int] = []
        for mask in reversed(found):
            run = run + 1 if mask & shards else 0
            runs.append(run)
        runs.reverse()
        return tuple(runs)

    def _store_keys(self, known: _Holder, keys: Sequence[bytes]) -> None:
        masks = self._masks
        bit = known.bit
        if masks.keys().isdisjoint(keys):  # as most are: all at once
            new = dict.fromkeys(reversed(keys), bit)
            masks.update(new)
            known.blocks += len(new)
            keys = ()
        for key in reversed(keys):
            mask = masks.get(key, 0)
            if not mask & bit:
                known.blocks += 1
            masks[key] = mask & ~self._dead | bit
            if mask:  # a new one is at the end already
                masks.move_to_end(key)
        while len(masks) > self._max_entries:
            _, mask = masks.popitem(last=False)
            self._uncount(mask)
            self.evicted += 1

    def _remove_keys(self, known: _Holder, keys: Sequence[bytes]) -> None:
        masks = self._masks
        for key in keys:
            mask = masks.get(key, 0)
            if not mask & known.bit:
                continue
            known.blocks -= 1
            rest = mask & ~known.bit & ~self._dead
            if rest:
                masks[key] = rest
            else:
                del masks[key]

    def _uncount(self, mask: int) -> None:
        bits = mask & self._live
        while bits:
            bit = bits & -bits
            self._holders[self._names[bit]].blocks -= 1
            bits ^= bit

    def _take_bit(self, holder: str, known: _Holder) -> None:
        used = self._live | self._dead
        known.bit = ~used & (used + 1)  # the lowest bit that is clear
        known.blocks = 0
        known.sequence = None
        self._names[known.bit] = holder
        self._live |= known.bit
        if known.shard:
            self._shards |= known.bit

    def _drop_bit(self, known: _Holder) -> None:
        self._live &= ~known.bit
        self._shards &= ~known.bit
        del self._names[known.bit]
        if known.blocks:
            self._dead |= known.bit

    def _sweep(self) -> None:
        """Cleans a few entries of dead bits; a bit is used again when all entries are clean."""
        if not self._to_sweep:
            self._dead &= ~self._sweeping
            self._sweeping = self._dead
            if self._dead:
                self._to_sweep = list(self._masks)
            return
        masks = self._masks
        keep = ~self._sweeping
        for key in self._to_sweep[-SWEEP_STEP:]:
            mask = masks.get(key)
            if mask is None or mask & keep == mask:
                continue
            if mask & keep:
                masks[key] = mask & keep
            else:
                del masks[key]
        del self._to_sweep[-SWEEP_STEP:]
