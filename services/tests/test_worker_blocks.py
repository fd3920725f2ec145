"""The block cache against a model that knows every block's state by brute force."""

import random

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from kvmesh.services.worker.blocks import BlockCache, CacheEvents
from kvmesh.services.worker.outbox import Outbox
from kvmesh.services.worker.sequence import Tail
from kvmesh.services.worker.tails import KeptTails


class Reference:
    """References and keys by block; evictable blocks by time of release. Slow and plain."""

    def __init__(self, num_blocks: int) -> None:
        self.references = dict.fromkeys(range(num_blocks), 0)
        self.keys: dict[int, bytes] = {}
        self.unused: list[int] = []

    @property
    def free(self) -> set[int]:
        return {i for i, n in self.references.items() if not n and i not in self.keys}

    def take(self, block: int) -> None:
        if block not in self.free:  # must be the one that waits longest, and none be free
            assert not self.free
            assert block == self.unused.pop(0)
            del self.keys[block]
        self.references[block] = 1

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            if not self.references[block] and block in self.keys:
                self.unused.append(block)


@seed(20)
@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 9))
def test_cache_is_the_reference(rng: random.Random, num_blocks: int) -> None:
    cache, reference = BlockCache(num_blocks), Reference(num_blocks)
    held: list[list[int]] = []
    known: set[bytes] = set()
    for _ in range(60):
        action = rng.choice(["allocate", "seal", "release", "match", "forget", "drain"])
        if action == "allocate":
            count = rng.randint(1, 3)
            fits = len(reference.free) + len(reference.unused) >= count
            assert cache.can_allocate(count) == fits
            if fits:
                held.append(cache.allocate(count))
                for block in held[-1]:
                    reference.take(block)
            else:
                with pytest.raises(ValueError, match="available"):
                    cache.allocate(count)
        elif action == "seal" and held:
            block, key = rng.choice(rng.choice(held)), bytes([rng.randint(0, 12)])
            if key not in reference.keys.values() and block not in reference.keys:
                reference.keys[block] = key
            cache.seal(block, key)
        elif action == "release" and held:
            blocks = held.pop(rng.randrange(len(held)))
            cache.release(blocks)
            reference.release(blocks)
        elif action == "match":
            keys = [bytes([rng.randint(0, 12)]) for _ in range(3)]
            found = cache.match(keys)
            by_key = {key: block for block, key in reference.keys.items()}
            length = next((i for i, key in enumerate(keys) if key not in by_key), 3)
            assert found == [by_key[key] for key in keys[:length]]
            if found and len(set(found)) == len(found):
                cache.acquire(found)
                for block in found:
                    reference.references[block] += 1
                reference.unused = [b for b in reference.unused if b not in found]
                held.append(found)
        elif action == "forget":
            block = rng.randrange(num_blocks)
            cache.forget(block)
            reference.keys.pop(block, None)
            reference.unused = [b for b in reference.unused if b != block]
        else:
            events = cache.drain_events()
            assert not known & set(events.stored)
            assert set(events.removed) <= known
            known = (known | set(events.stored)) - set(events.removed)
            assert known == set(reference.keys.values()) == set(cache.keys())
        cache.check_integrity()
        assert cache.available == len(reference.free) + len(reference.unused)
        assert cache.num_references == sum(map(len, held))


def test_of_one_sequence_the_deepest_blocks_go_first() -> None:
    cache = BlockCache(4)
    blocks = cache.allocate(4)
    for index, block in enumerate(blocks):
        cache.seal(block, bytes([index]))
    cache.release(blocks)
    cache.allocate(2)
    assert len(cache.match([b"\0", b"\1", b"\2", b"\3"])) == 2


def test_blocks_to_be_kept_are_not_counted_as_available() -> None:
    cache = BlockCache(3)
    blocks = cache.allocate(2)
    cache.seal(blocks[0], b"a")
    cache.release(blocks)
    assert cache.can_allocate(3) and not cache.can_allocate(3, keeping=blocks[:1])
    assert cache.can_allocate(2, keeping=blocks[:1])


def test_a_block_is_offered_to_the_shards_once_until_it_is_gone() -> None:
    cache = BlockCache(1)
    (block,) = cache.allocate(1)
    cache.seal(block, b"a")
    assert cache.share(b"a") and not cache.share(b"a")
    cache.unshare([b"a", b"never held"])
    assert cache.share(b"a") and not cache.share(b"a")
    cache.release([block])
    cache.seal(cache.allocate(1)[0], b"a")  # evicted, then computed again
    assert cache.share(b"a")
    cache.check_integrity()


def test_tails_expire_and_are_bounded() -> None:
    tails, tail = KeptTails(max_tails=2, keep_s=30), Tail(64, 3, b"x")
    tails.keep("a", tail, 0)
    tails.keep("b", tail, 10)
    assert tails.take("a", 29.9) == tail and tails.take("a", 29.9) is None
    assert tails.take("b", 40) is None
    for name in "cde":
        tails.keep(name, tail, 50)
    assert len(tails) == 2 and tails.take("c", 51) is None
    tails.drop("d")
    tails.drop("never kept")
    assert tails.take("e", 79) == tail


async def test_outbox_coalesces_block_events_to_their_sum() -> None:
    outbox = Outbox(9, [b"a"])
    outbox.add_events(CacheEvents((b"b", b"c"), ()))
    outbox.add_events(CacheEvents((b"d",), (b"b",)))
    message = await outbox.next()
    assert message is not None and message.events.snapshot and message.events.sequence == 1
    outbox.add_events(CacheEvents((), (b"d",)))
    outbox.add_events(CacheEvents((b"d",), (b"a",)))
    second = await outbox.next()
    assert second is not None and not second.events.snapshot and second.events.sequence == 2
    held = set(message.events.stored) - set(message.events.removed)
    assert (held | set(second.events.stored)) - set(second.events.removed) == {b"c", b"d"}
