"""Sealed blocks by key within a byte budget: leases, least-recently-used eviction. Pure.

Blocks of one prefix form a chain (parent, index). A block without its ancestors is of no use, so
the deepest goes first:

    candidates   no child held here, in no lease
    order        least recently used; of equally old ones (touched by one call) the deepest

What a call evicts is in its return value, for those who follow the store's content. Times are
seconds of any clock that does not run backwards.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvmesh.services.common.errors import NotFound, Overloaded
from kvmesh.services.kvcache.outcomes import LookupResult, PutOutcome, StoreStats

MAX_LEASES = 65_536
_HEAP_SLACK = 1024  # outdated heap entries beyond one per block, before they are swept out


Content = TypeVar("Content", bound=Sized)


@dataclass(slots=True)
class _Block(Generic[Content]):
    key: bytes
    parent: bytes
    index: int
    data: Content
    last_used: float
    leases: int = 0

    @property
    def own_link(self) -> tuple[bytes, int]:
        return (self.key, self.index)

    @property
    def parent_link(self) -> tuple[bytes, int]:
        """A wrong parent that a caller names must not close a circle, which nobody could evict:
        along links that agree with the index, the index only falls."""
        return (self.parent, self.index - 1)


@dataclass(frozen=True, slots=True)
class _Lease(Generic[Content]):
    blocks: tuple[_Block[Content], ...]
    expires: float


@dataclass(slots=True)
class _Counts:
    hits: int = 0
    misses: int = 0
    puts: int = 0
    evictions: int = 0
    leases: int = 0
    leased_blocks: int = 0
    bytes_used: int = 0


def _forget(content: Sized) -> None:
    """What main memory needs to be told."""


@dataclass(slots=True)
class BlockStore(Generic[Content]):
    """Each operation costs O(log n) per block that it names or evicts.

    Content: a block's bytes, or whatever stands for them and has their length. free: told of each
    that is let go. lease_prefix: begins every lease id; tells one life of a process from the next.
    """

    max_bytes: int
    lease_prefix: str = ""
    free: Callable[[Content], None] = _forget
    _blocks: dict[bytes, _Block[Content]] = field(default_factory=dict)
    _children: Counter[tuple[bytes, int]] = field(default_factory=Counter)
    _leases: dict[str, _Lease[Content]] = field(default_factory=dict)
    _expiries: list[tuple[float, str]] = field(default_factory=list)  # may be outdated
    _candidates: list[tuple[float, int, bytes]] = field(default_factory=list)  # may be outdated
    _counts: _Counts = field(default_factory=_Counts)

    def lookup(self, keys: Sequence[bytes], now: float, lease_s: float = 0.0) -> LookupResult:
        """Which keys are held; they count as used. With lease_s > 0 they stay until release or
        now + lease_s. Raises Overloaded if there are too many leases."""
        self.expire(now)
        if lease_s > 0 and len(self._leases) >= MAX_LEASES:
            raise Overloaded(f"{len(self._leases)} leases are open, the limit is {MAX_LEASES}")
        found = [self._blocks.get(key) for key in keys]
        for block in found:
            if block is not None:
                self._touch(block, now)
        lease_id = ""
        unique = {block.key: block for block in found if block is not None}
        if lease_s > 0 and unique:
            lease_id = self._lease(tuple(unique.values()), now + lease_s)
        held = [block is not None for block in found]
        return LookupResult(held, held.index(False) if False in held else len(held), lease_id)

    def get(self, key: bytes, now: float) -> Content | None:
        """The block's bytes, or None. Counts a hit or a miss; a hit counts as used."""
        block = self._blocks.get(key)
        if block is None:
            self._counts.misses += 1
            return None
        self._counts.hits += 1
        self._touch(block, now)
        return block.data

    def put(self, key: bytes, parent: bytes, index: int, data: Content, now: float) -> PutOutcome:
        """Stores a block, evicting what is worth less than it.

        Raises Overloaded, and changes nothing, if what may be evicted does not make room.
        """
        self.expire(now)
        held = self._blocks.get(key)
        if held is not None:
            self._touch(held, now)
            return PutOutcome(stored=False)
        block = _Block(key, parent, index, data, now)
        victims = self._make_room(block)
        self._attach(block)
        self._counts.puts += 1
        self._counts.evictions += len(victims)
        for victim in victims:
            self.free(victim.data)
        return PutOutcome(True, tuple(victim.key for victim in victims))

    def remove(self, key: bytes) -> bool:
        """Drops a block, leased or not; whether it was held."""
        block = self._blocks.get(key)
        if block is None:
            return False
        self._detach(block)
        self.free(block.data)
        return True

    def overwrite(self, key: bytes, data: Content) -> None:
        """Fault injection: other bytes of the same size under a held key. Raises NotFound."""
        block = self._blocks.get(key)
        if block is None or len(block.data) != len(data):
            raise NotFound(f"no block {key.hex()} of {len(data)} bytes is held")
        self.free(block.data)
        block.data = data

    def release(self, lease_id: str) -> None:
        """Ends a lease; one that has ended already is no error."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        for block in lease.blocks:
            block.leases -= 1
            self._counts.leased_blocks -= block.leases == 0 and self._holds(block)
            self._offer(block)
        if len(self._expiries) > 2 * len(self._leases) + _HEAP_SLACK:
            self._expiries = [(lease.expires, name) for name, lease in self._leases.items()]
            heapq.heapify(self._expiries)

    def expire(self, now: float) -> None:
        """Ends the leases whose time has passed."""
        while self._expiries and self._expiries[0][0] <= now:
            self.release(heapq.heappop(self._expiries)[1])

    def keys(self) -> list[bytes]:
        return list(self._blocks)

    def peek(self, key: bytes) -> Content | None:
        """As `get`, but neither counted nor taken as use."""
        block = self._blocks.get(key)
        return None if block is None else block.data

    def stats(self) -> StoreStats:
        counts = self._counts
        return StoreStats(
            blocks=len(self._blocks),
            bytes_used=counts.bytes_used,
            bytes_budget=self.max_bytes,
            hits=counts.hits,
            misses=counts.misses,
            puts=counts.puts,
            evictions=counts.evictions,
            leases=len(self._leases),
            leased_blocks=counts.leased_blocks,
        )

    def check_integrity(self) -> None:
        """Recomputes what is kept incrementally. Raises RuntimeError naming what differs."""
        blocks = self._blocks.values()
        held_leases = Counter(b.key for v in self._leases.values() for b in v.blocks
                              if self._holds(b))  # fmt: skip
        offered = set(self._candidates)
        checks = {
            "bytes used": self._counts.bytes_used == sum(len(b.data) for b in blocks),
            "budget": self._counts.bytes_used <= self.max_bytes,
            "children": self._children == Counter(b.parent_link for b in blocks if b.parent),
            "leases per block": all(b.leases == held_leases[b.key] for b in blocks),
            "leased blocks": self._counts.leased_blocks == sum(b.leases > 0 for b in blocks),
            "keys": all(key == b.key for key, b in self._blocks.items()),
            "candidates": all(_rank(b) in offered for b in blocks if self._evictable(b)),
            "expiries": {(v.expires, k) for k, v in self._leases.items()} <= set(self._expiries),
        }
        wrong = [name for name, right in checks.items() if not right]
        if wrong:
            raise RuntimeError(f"block store is inconsistent: {', '.join(wrong)}")

    def _lease(self, blocks: tuple[_Block[Content], ...], expires: float) -> str:
        self._counts.leases += 1
        lease_id = f"{self.lease_prefix}{self._counts.leases}"
        for block in blocks:
            block.leases += 1
            self._counts.leased_blocks += block.leases == 1
        self._leases[lease_id] = _Lease(blocks, expires)
        heapq.heappush(self._expiries, (expires, lease_id))
        return lease_id

    def _make_room(self, newcomer: _Block[Content]) -> list[_Block[Content]]:
        """Detaches what must go; puts it back and raises Overloaded if it is not enough."""
        size = len(newcomer.data)
        victims: list[_Block[Content]] = []
        link = newcomer.parent_link
        self._children[link] += 1  # its parent must not make room for it
        try:
            while self._counts.bytes_used + size > self.max_bytes:
                victim = self._next_victim(newcomer)
                if victim is None:
                    raise Overloaded(self._refusal(newcomer))
                victims.append(victim)
                self._detach(victim)
        except Overloaded:
            for victim in reversed(victims):
                self._attach(victim)
            raise
        finally:
            self._unlink(link)
        return victims

    def _next_victim(self, newcomer: _Block[Content]) -> _Block[Content] | None:
        while self._candidates:
            rank = self._candidates[0]
            block = self._blocks.get(rank[2])
            if block is None or _rank(block) != rank or not self._evictable(block):
                heapq.heappop(self._candidates)
            elif rank > _rank(newcomer):
                return None  # the newcomer itself would be the first to go
            else:
                return block
        return None

    def _refusal(self, newcomer: _Block[Content]) -> str:
        return (
            f"no room for block {newcomer.index} of {len(newcomer.data)} bytes: "
            f"{self._counts.bytes_used} of {self.max_bytes} bytes are used, "
            f"{self._counts.leased_blocks} of {len(self._blocks)} blocks are leased, "
            "the rest is in use by their chains or worth more"
        )

    def _touch(self, block: _Block[Content], now: float) -> None:
        if now > block.last_used:
            block.last_used = now
            self._offer(block)

    def _attach(self, block: _Block[Content]) -> None:
        self._blocks[block.key] = block
        self._counts.bytes_used += len(block.data)
        if block.parent:
            self._children[block.parent_link] += 1
        self._offer(block)

    def _detach(self, block: _Block[Content]) -> None:
        del self._blocks[block.key]
        self._counts.bytes_used -= len(block.data)
        self._counts.leased_blocks -= block.leases > 0
        if block.parent:
            self._unlink(block.parent_link)

    def _unlink(self, link: tuple[bytes, int]) -> None:
        self._children[link] -= 1
        if not self._children[link]:
            del self._children[link]
            parent = self._blocks.get(link[0])
            if parent is not None:
                self._offer(parent)

    def _holds(self, block: _Block[Content]) -> bool:
        return self._blocks.get(block.key) is block

    def _evictable(self, block: _Block[Content]) -> bool:
        return not block.leases and block.own_link not in self._children

    def _offer(self, block: _Block[Content]) -> None:
        """Makes the block a candidate for eviction, if it is one now."""
        if not self._holds(block) or not self._evictable(block):
            return
        heapq.heappush(self._candidates, _rank(block))
        if len(self._candidates) > 2 * len(self._blocks) + _HEAP_SLACK:
            self._candidates = [_rank(b) for b in self._blocks.values() if self._evictable(b)]
            heapq.heapify(self._candidates)


def _rank(block: _Block[Content]) -> tuple[float, int, bytes]:
    """The lowest goes first."""
    return (block.last_used, -block.index, block.key)
