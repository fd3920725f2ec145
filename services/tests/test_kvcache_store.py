"""The block store against a naive model that scans everything, and each rule by hand."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvmesh.services.common.errors import NotFound, Overloaded
from kvmesh.services.kvcache.store import BlockStore

BUDGET = 60


def key_of(chain: int, index: int) -> bytes:
    return bytes((chain, index)) * 8


def parent_of(chain: int, index: int) -> bytes:
    return key_of(chain, index - 1) if index else b""


def put(
    store: BlockStore[bytes], chain: int, index: int, now: float, size: int = 10
) -> tuple[bytes, ...]:
    data = bytes([index]) * size
    return store.put(key_of(chain, index), parent_of(chain, index), index, data, now).evicted


class NaiveStore:
    """What the store must do, written down as scans over a dict."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, tuple[bytes, int, bytes, float]] = {}
        self.leases: dict[str, tuple[float, list[bytes]]] = {}

    def expire(self, now: float) -> None:
        self.leases = {k: v for k, v in self.leases.items() if v[0] > now}

    def touch(self, key: bytes, now: float) -> None:
        parent, index, data, used = self.blocks[key]
        self.blocks[key] = (parent, index, data, max(used, now))

    def drop(self, key: bytes) -> None:
        self.blocks.pop(key, None)
        for _, keys in self.leases.values():
            keys[:] = [k for k in keys if k != key]

    def put(
        self, key: bytes, parent: bytes, index: int, data: bytes, now: float
    ) -> list[bytes] | None:
        """The evicted keys in order; None for no room."""
        before = dict(self.blocks)
        evicted = []
        while sum(len(b[2]) for b in self.blocks.values()) + len(data) > BUDGET:
            leased = {k for _, keys in self.leases.values() for k in keys}
            parents = {(b[0], b[1] - 1) for b in self.blocks.values()} | {(parent, index - 1)}
            free = [
                (b[3], -b[1], k)
                for k, b in self.blocks.items()
                if k not in leased and (k, b[1]) not in parents
            ]
            if not free or min(free) > (now, -index, key):
                self.blocks = before
                return None
            victim = min(free)[2]
            del self.blocks[victim]
            evicted.append(victim)
        self.blocks[key] = (parent, index, data, now)
        return evicted


chains = st.integers(0, 3)
depths = st.integers(0, 5)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.freed: list[bytes] = []
        self.store: BlockStore[bytes] = BlockStore(BUDGET, free=self.freed.append)
        self.model = NaiveStore()
        self.now = 0.0

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(chain=chains, index=depths, size=st.sampled_from([1, 10, 10, 25, 61]))
    def put_block(self, chain: int, index: int, size: int) -> None:
        self.put_any(key_of(chain, index), parent_of(chain, index), index, size)

    @rule(chain=chains, index=depths, other=chains, at=depths, size=st.sampled_from([10, 20]))
    def put_with_any_parent(self, chain: int, index: int, other: int, at: int, size: int) -> None:
        self.put_any(key_of(chain, index), key_of(other, at), index, size)

    def put_any(self, key: bytes, parent: bytes, index: int, size: int) -> None:
        data = bytes([index]) * size
        self.model.expire(self.now)
        if key in self.model.blocks:
            self.model.touch(key, self.now)
            assert not self.store.put(key, parent, index, data, self.now).stored
            return
        expected = self.model.put(key, parent, index, data, self.now)
        if expected is None:
            with pytest.raises(Overloaded, match="no room"):
                self.store.put(key, parent, index, data, self.now)
        else:
            outcome = self.store.put(key, parent, index, data, self.now)
            assert (outcome.stored, list(outcome.evicted)) == (True, expected)

    @rule(chain=chains, count=st.integers(1, 6), lease=st.sampled_from([0.0, 1.0, 2.5]))
    def look_up(self, chain: int, count: int, lease: float) -> None:
        keys = [key_of(chain, index) for index in range(count)]
        self.model.expire(self.now)
        held = [key in self.model.blocks for key in keys]
        found = self.store.lookup(keys, self.now, lease)
        assert found.held == held
        assert found.num_prefix == [*held, False].index(False)
        assert bool(found.lease_id) == (lease > 0 and any(held))
        for key, there in zip(keys, held, strict=True):
            if there:
                self.model.touch(key, self.now)
        if found.lease_id:
            pinned = [key for key, there in zip(keys, held, strict=True) if there]
            self.model.leases[found.lease_id] = (self.now + lease, pinned)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        names = [*sorted(self.model.leases), "unknown"]
        name = data.draw(st.sampled_from(names))
        self.store.release(name)
        self.model.leases.pop(name, None)

    @rule(chain=chains, index=depths)
    def get(self, chain: int, index: int) -> None:
        key = key_of(chain, index)
        found = self.store.get(key, self.now)
        if key in self.model.blocks:
            self.model.touch(key, self.now)
            assert found == self.model.blocks[key][2]
        else:
            assert found is None

    @rule(chain=chains, index=depths)
    def remove(self, chain: int, index: int) -> None:
        key = key_of(chain, index)
        assert self.store.remove(key) == (key in self.model.blocks)
        self.model.drop(key)

    @invariant()
    def same_content(self) -> None:
        self.store.check_integrity()
        assert set(self.store.keys()) == set(self.model.blocks)
        self.store.expire(self.now)
        self.model.expire(self.now)
        stats = self.store.stats()
        leased = {k for _, keys in self.model.leases.values() for k in keys}
        assert stats.leased_blocks == len(leased)
        assert stats.leases == len(self.model.leases)
        assert len(self.freed) == stats.puts - stats.blocks  # each once, when it is let go
        assert stats.bytes_used == sum(len(b[2]) for b in self.model.blocks.values()) <= BUDGET


TestStoreAgainstModel = StoreMachine.TestCase
TestStoreAgainstModel.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_the_deepest_of_the_oldest_chain_goes_first() -> None:
    store = BlockStore(60)
    for chain in (0, 1):
        for index in range(3):
            put(store, chain, index, now=chain)
    assert put(store, 2, 0, now=5.0) == (key_of(0, 2),)
    assert put(store, 2, 1, now=5.0, size=30) == (key_of(0, 1), key_of(0, 0), key_of(1, 2))
    store.check_integrity()


def test_use_keeps_a_chain() -> None:
    store = BlockStore(40)
    for chain in (0, 1):
        for index in range(2):
            put(store, chain, index, now=chain)
    store.lookup([key_of(0, 0), key_of(0, 1)], 2.0)
    assert put(store, 2, 0, now=3.0) == (key_of(1, 1),)
    store.get(key_of(1, 0), 4.0)
    assert put(store, 2, 1, now=5.0) == (key_of(0, 1),)


def test_a_leased_block_and_its_ancestors_stay() -> None:
    store = BlockStore(30)
    for index in range(3):
        put(store, 0, index, now=0.0)
    lease = store.lookup([key_of(0, 2)], 1.0, 10.0).lease_id
    with pytest.raises(Overloaded, match=r"30 of 30 bytes are used, 1 of 3 blocks are leased"):
        put(store, 1, 0, now=2.0)
    assert len(store.keys()) == 3
    store.release(lease)
    assert put(store, 1, 0, now=3.0) == (key_of(0, 2),)


def test_a_lease_ends_with_its_time() -> None:
    store = BlockStore(10)
    put(store, 0, 0, now=0.0)
    lease = store.lookup([key_of(0, 0)], 0.0, 5.0).lease_id
    with pytest.raises(Overloaded):
        put(store, 1, 0, now=4.999)
    assert put(store, 1, 0, now=5.0) == (key_of(0, 0),)
    store.release(lease)
    store.check_integrity()


def test_two_leases_on_one_block_both_count() -> None:
    store = BlockStore(10)
    put(store, 0, 0, now=0.0)
    first, second = (store.lookup([key_of(0, 0)] * 2, 0.0, 60.0).lease_id for _ in range(2))
    store.release(first)
    store.release(first)
    with pytest.raises(Overloaded):
        put(store, 1, 0, now=1.0)
    store.release(second)
    assert put(store, 1, 0, now=1.0) == (key_of(0, 0),)


def test_a_chain_longer_than_the_budget_keeps_its_beginning() -> None:
    """Also where only every second block of the chain is placed here."""
    store = BlockStore(50)
    for index in range(0, 10, 2):
        put(store, 0, index, now=1.0)
    with pytest.raises(Overloaded):
        put(store, 0, 10, now=1.0)
    assert store.keys() == [key_of(0, index) for index in range(0, 10, 2)]


def test_a_refused_block_evicts_nothing() -> None:
    store = BlockStore(50)
    for chain in range(5):
        put(store, chain, 0, now=chain)
    store.lookup([key_of(4, 0)], 9.0, 60.0)
    with pytest.raises(Overloaded):
        put(store, 5, 0, now=10.0, size=45)
    assert len(store.keys()) == 5
    assert store.stats().evictions == 0
    assert put(store, 5, 0, now=10.0, size=40) == tuple(key_of(c, 0) for c in range(4))


def test_a_circle_of_parents_can_still_be_evicted() -> None:
    store = BlockStore(20)
    a, b = key_of(0, 1), key_of(0, 2)
    store.put(a, b, 1, b"a" * 10, 0.0)
    store.put(b, a, 2, b"b" * 10, 0.0)
    assert put(store, 1, 0, now=1.0, size=20) == (b, a)


def test_overwrite_needs_a_held_block_of_that_size() -> None:
    store = BlockStore(20)
    put(store, 0, 0, now=0.0)
    store.overwrite(key_of(0, 0), b"x" * 10)
    assert store.peek(key_of(0, 0)) == b"x" * 10
    with pytest.raises(NotFound):
        store.overwrite(key_of(0, 0), b"x")
    with pytest.raises(NotFound):
        store.overwrite(key_of(1, 0), b"x" * 10)


def test_side_structures_stay_bounded_by_the_content() -> None:
    """Touching and leasing for ever must not grow the heaps for ever."""
    store = BlockStore(1000)
    source = random.Random(3)
    for index in range(100):
        put(store, index, 0, now=0.0)
    for step in range(20_000):
        lease = store.lookup([key_of(source.randrange(100), 0)], float(step), 50_000.0).lease_id
        store.release(lease)
    assert len(store._candidates) <= 2 * 100 + 1024
    assert len(store._expiries) <= 1024 + 2
    store.check_integrity()


def test_integrity_check_notices_damage() -> None:
    store = BlockStore(100)
    put(store, 0, 0, now=0.0)
    store.check_integrity()
    store._blocks[key_of(0, 0)].leases = 1
    with pytest.raises(RuntimeError, match="leases per block"):
        store.check_integrity()
