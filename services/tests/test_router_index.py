"""The prefix index against a model that keeps a plain set of keys per holder."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.services.router.index import BYTES_PER_ENTRY, SWEEP_STEP, PrefixIndex
from kvmesh.services.router.speculation import Speculation
from kvmesh.v1 import common_pb2

PLENTY = 1 << 24
HOLDERS = ("worker-0", "worker-1", "shard-0", "shard-1")
KEYS = [bytes([number]) * 16 for number in range(12)]


def events(
    incarnation: int,
    sequence: int,
    stored: list[bytes],
    removed: list[bytes] | None = None,
    snapshot: bool = False,
) -> common_pb2.BlockEvents:
    return common_pb2.BlockEvents(
        incarnation=incarnation,
        sequence=sequence,
        snapshot=snapshot,
        stored=stored,
        removed=removed or [],
    )


def holding(index: PrefixIndex, holder: str, keys: list[bytes], incarnation: int = 1) -> None:
    index.add(holder, incarnation, holder.startswith("shard"))
    assert index.apply(holder, events(incarnation, 1, keys, snapshot=True)) == "ok"


@dataclass
class Life:
    incarnation: int
    sequence: int | None = None
    keys: set[bytes] = field(default_factory=set)


def prefix_length(keys: list[bytes], held: set[bytes]) -> int:
    length = 0
    while length < len(keys) and keys[length] in held:
        length += 1
    return length


keys_lists = st.lists(st.sampled_from(KEYS), max_size=8)
actions = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(HOLDERS)),
    st.tuples(st.just("remove"), st.sampled_from(HOLDERS)),
    st.tuples(
        st.just("apply"),
        st.sampled_from(HOLDERS),
        keys_lists,
        keys_lists,
        st.booleans(),  # snapshot
        st.sampled_from([0, 0, 0, 0, 1, -1]),  # how far off the sequence number is
        st.sampled_from([0, 0, 0, 0, 1]),  # how far off the incarnation is
    ),
    st.tuples(st.just("match"), keys_lists),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(actions, max_size=40))
def test_it_agrees_with_plain_sets(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    index = PrefixIndex(PLENTY)
    lives: dict[str, Life] = {}
    incarnations = 10
    for step in steps:
        if step[0] == "add":
            incarnations += 10
            index.add(step[1], incarnations, step[1].startswith("shard"))
            lives[step[1]] = Life(incarnations)
        elif step[0] == "remove":
            index.remove(step[1])
            lives.pop(step[1], None)
        elif step[0] == "apply":
            apply_both(index, lives, step)
        else:
            check_match(index, lives, step[1])
        for holder in HOLDERS:
            want = len(lives[holder].keys) if holder in lives else 0
            assert index.blocks_of(holder) == want
    check_match(index, lives, KEYS)


def apply_both(index: PrefixIndex, lives: dict[str, Life], step: tuple) -> None:  # type: ignore[type-arg]
    _, holder, stored, removed, snapshot, off, other = step
    life = lives.get(holder, Life(1))
    sequence = max(0, (life.sequence or 0) + 1 + off)
    got = index.apply(holder, events(life.incarnation + other, sequence, stored, removed, snapshot))
    if holder not in lives or other:
        assert got == "stale"
    elif not snapshot and (life.sequence is None or sequence != life.sequence + 1):
        assert got == "gap"
        life.sequence = None
    else:
        assert got == "ok"
        life.sequence = sequence
        if snapshot:
            life.keys = set()
        life.keys = (life.keys - set(removed)) | set(stored)


def check_match(index: PrefixIndex, lives: dict[str, Life], keys: list[bytes]) -> None:
    match = index.match(keys)
    shards = set[bytes]().union(*(x.keys for n, x in lives.items() if n.startswith("shard")))
    for holder, life in lives.items():
        if holder.startswith("shard"):
            assert holder not in match.local
            continue
        local = prefix_length(keys, life.keys)
        assert match.local[holder] == local
        assert match.remote_after(local) == prefix_length(keys[local:], shards)
    assert match.remote_after(0) == prefix_length(keys, shards)


def test_a_new_life_of_a_holder_begins_empty() -> None:
    index = PrefixIndex(PLENTY)
    holding(index, "worker-0", KEYS)
    holding(index, "worker-1", KEYS[:3])
    index.add("worker-0", 2)
    assert index.match(KEYS).local == {"worker-0": 0, "worker-1": 3}
    assert index.apply("worker-0", events(1, 2, KEYS)) == "stale"
    index.remove("worker-1")
    assert index.match(KEYS).local == {"worker-0": 0}


def test_entries_of_ended_lives_are_swept() -> None:
    index = PrefixIndex(PLENTY)
    many = [number.to_bytes(16, "big") for number in range(3 * SWEEP_STEP)]
    for incarnation in range(1, 6):
        holding(index, "worker-0", many, incarnation)
    holding(index, "worker-1", KEYS)
    index.remove("worker-0")
    for sequence in range(2, 40):
        assert index.apply("worker-1", events(1, sequence, [])) == "ok"
    assert index.entries == len(KEYS)
    index.add("worker-2", 1)
    assert index.bit_of("worker-2", 1) < 1 << 8, "bits of ended lives are used again"


def test_it_stays_within_its_bytes_and_evicts_the_least_recently_matched() -> None:
    index = PrefixIndex(8 * BYTES_PER_ENTRY)
    holding(index, "worker-0", KEYS[:8])
    assert index.match(KEYS[:4]).local == {"worker-0": 4}
    assert index.apply("worker-0", events(1, 2, KEYS[8:12])) == "ok"
    assert (index.entries, index.evicted, index.blocks_of("worker-0")) == (8, 4, 8)
    assert index.num_bytes <= 8 * BYTES_PER_ENTRY
    assert index.match(KEYS[:8]).local == {"worker-0": 4}
    assert index.match(KEYS[8:12]).local == {"worker-0": 4}


def test_a_block_goes_before_its_parent() -> None:
    index = PrefixIndex(4 * BYTES_PER_ENTRY)
    holding(index, "worker-0", KEYS[:4])
    index.match(KEYS[:4])
    index.apply("worker-0", events(1, 2, [KEYS[9]]))
    assert index.match(KEYS[:4]).local == {"worker-0": 3}


def test_a_worker_goes_on_where_shards_begin() -> None:
    index = PrefixIndex(PLENTY)
    holding(index, "worker-0", KEYS[:2])
    holding(index, "worker-1", [])
    holding(index, "shard-0", [KEYS[0], KEYS[2], KEYS[4]])
    holding(index, "shard-1", [KEYS[3], KEYS[5]])
    match = index.match(KEYS)
    assert match.local == {"worker-0": 2, "worker-1": 0}
    assert match.remote_after(2) == 4
    assert match.remote_after(0) == 1


def test_expected_blocks_count_until_their_time() -> None:
    index, soon = PrefixIndex(PLENTY), Speculation()
    index.add("worker-0", 5)
    soon.expect(("worker-0", 5), KEYS[:2], now=0.0, until=10.0)
    soon.expect(("worker-0", 5), KEYS[:1], now=1.0, until=20.0)
    assert soon.holders(KEYS[1], 9.9) == [("worker-0", 5)]
    assert soon.holders(KEYS[1], 10.0) == []
    assert soon.holders(KEYS[0], 19.9) == [("worker-0", 5)]
    mask = index.bit_of("worker-0", 5)
    assert index.match(KEYS, [mask, mask]).local == {"worker-0": 2}
    index.add("worker-0", 6)
    assert index.bit_of("worker-0", 5) == 0, "what was expected of an ended life means nothing"


def test_expectations_are_bounded() -> None:
    soon = Speculation(max_keys=4)
    for number, key in enumerate(KEYS):
        soon.expect(("worker-0", 1), [key], now=0.0, until=5.0 + number)
    assert [key for key in KEYS if soon.holders(key, 0.0)] == KEYS[-4:]
