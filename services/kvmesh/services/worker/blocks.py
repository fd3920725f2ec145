"""Who uses which block of the pool, and which sealed blocks can be used again. Pure.

A block is free, in use (referenced by sequences), or cached: sealed, known by its key, and
referenced by none. Cached blocks are found again by their keys until their room is needed; the
one released longest ago goes first, and of one sequence the deepest, which is of no use once a
block before it is gone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """Keys that came and went, without those that did both."""

    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]


class BlockCache:
    """Ids 0..num_blocks-1 with reference counts and the keys of sealed ones."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._id_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached, the next to evict first
        self._shared: set[bytes] = set()  # keys held whose blocks shards were given, or gave
        self._changes: dict[bytes, bool] = {}  # key -> whether it was held at the last drain

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free or evictable."""
        return len(self._free) + len(self._unused)

    @property
    def num_references(self) -> int:
        """Sum over all blocks."""
        return sum(self._references)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest prefix of `keys` that is held. References nothing."""
        found = list(map(self._id_of.get, keys))
        held = found.index(None) if None in found else len(found)
        return [block for block in found[:held] if block is not None]

    def can_allocate(self, count: int, keeping: Sequence[int] = ()) -> bool:
        """Whether `count` blocks are available besides the cached ones in `keeping`."""
        kept = sum(1 for block in keeping if block in self._unused)
        return count <= self.available - kept

    def acquire(self, ids: Sequence[int]) -> None:
        """One more reference to each; cached ones can then no longer be evicted."""
        for block in ids:
            self._unused.pop(block, None)
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """New blocks with one reference each, evicting if it must.

        Raises ValueError if there are not enough; ask `can_allocate` first.
        """
        if count > self.available:
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        kept = max(0, len(self._free) - count)
        ids = self._free[kept:]
        ids.reverse()
        del self._free[kept:]
        while len(ids) < count:
            evicted, _ = self._unused.popitem(last=False)
            self._forget_key(evicted)
            ids.append(evicted)
        for block in ids:
            self._references[block] = 1
        return ids

    def seal(self, block: int, key: bytes) -> None:
        """Makes a sealed block known. A second block with the same key stays private."""
        self.seal_all((block,), (key,))

    def seal_all(self, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """`seal` for each pair."""
        id_of, key_of, changes = self._id_of, self._key_of, self._changes
        new = dict(zip(keys, blocks, strict=True))
        if (  # nothing of it is known, as in most prompts: all at once
            len(new) == len(keys)
            and id_of.keys().isdisjoint(keys)
            and changes.keys().isdisjoint(keys)
            and key_of.keys().isdisjoint(blocks)
        ):
            id_of.update(new)
            key_of.update(zip(blocks, keys, strict=True))
            changes.update(dict.fromkeys(keys, False))
            return
        note = changes.setdefault
        for block, key in zip(blocks, keys, strict=True):
            if key not in id_of and block not in key_of:
                id_of[key] = block
                key_of[block] = key
                note(key, False)

    def release(self, ids: Sequence[int]) -> None:
        """One reference less to each; `ids` in the order of their sequence."""
        for block in reversed(ids):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._key_of:
                self._unused[block] = None
            else:
                self._free.append(block)

    def forget(self, block: int) -> None:
        """Makes a block unknown that does not verify; it is free when nobody refers to it."""
        if block not in self._key_of:
            return
        self._forget_key(block)
        if block in self._unused:
            del self._unused[block]
            self._free.append(block)

    def share(self, key: bytes) -> bool:
        """Notes that the shards get this block; False if they have it already."""
        if key in self._shared:
            return False
        if key in self._id_of:
            self._shared.add(key)
        return True

    def unshare(self, keys: Sequence[bytes]) -> None:
        """The shards did not take these after all."""
        self._shared.difference_update(keys)

    def keys(self) -> tuple[bytes, ...]:
        """All keys held."""
        return tuple(self._id_of)

    def drain_events(self) -> CacheEvents:
        """What changed since the last call."""
        held, changes = self._id_of, self._changes
        stored = tuple([key for key, was_held in changes.items() if not was_held and key in held])
        removed = tuple([key for key, was_held in changes.items() if was_held and key not in held])
        changes.clear()
        return CacheEvents(stored, removed)

    def check_integrity(self) -> None:
        """Raises AssertionError naming what does not fit together."""
        free, unused = set(self._free), set(self._unused)
        in_use = {i for i, count in enumerate(self._references) if count > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & unused and not free & in_use and not unused & in_use, "two states at once"
        assert len(free) + len(unused) + len(in_use) == self.num_blocks, "a block is lost"
        assert min(self._references, default=0) >= 0, "a block was released too often"
        assert unused <= self._key_of.keys(), "a cached block has no key"
        assert not free & self._key_of.keys(), "a free block has a key"
        assert self._shared <= self._id_of.keys(), "a key is shared that is not held"
        assert self._id_of == {key: i for i, key in self._key_of.items()}, "keys and ids differ"

    def _forget_key(self, block: int) -> None:
        key = self._key_of.pop(block)
        del self._id_of[key]
        self._shared.discard(key)
        self._note(key, was_held=True)

    def _note(self, key: bytes, was_held: bool) -> None:
        self._changes.setdefault(key, was_held)
