"""Keys and placement: against hashlib by hand, and as properties over random inputs."""

import hashlib
import random
import struct
from collections import Counter

import pytest
from call_counts import num_calls
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.services.kvcache.keys import KEY_BYTES, block_keys, child_key, root_key
from kvmesh.services.kvcache.placement import place, place_all

ROOT = root_key(b"f" * 16, "k4v4", 64, "")
token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def random_keys(count: int, seed: int = 7) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(KEY_BYTES) for _ in range(count)]


def test_child_key_is_the_documented_hash() -> None:
    ids = [0, 1, 65_537, 2**32 - 1]
    expected = hashlib.sha256(b"kvmesh.kv.block/1" + ROOT + struct.pack("<4I", *ids)).digest()[:16]
    assert child_key(ROOT, ids) == expected


def test_root_key_is_the_documented_hash() -> None:
    def sized(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    text = b"kvmesh.kv.root/1" + sized(b"ab") + sized(b"fp16") + sized(b"x") + struct.pack("<Q", 64)
    assert root_key(b"ab", "fp16", 64, "x") == hashlib.sha256(text).digest()[:16]


def test_every_part_of_the_root_matters_and_parts_do_not_run_together() -> None:
    roots = [
        root_key(b"f" * 16, "k4v4", 64, ""),
        root_key(b"g" * 16, "k4v4", 64, ""),
        root_key(b"f" * 16, "fp16", 64, ""),
        root_key(b"f" * 16, "k4v4", 32, ""),
        root_key(b"f" * 16, "k4v4", 64, "tenant"),
        root_key(b"f" * 15, "fk4v4", 64, ""),
        root_key(b"f" * 16, "k4v", 64, "4"),
    ]
    assert len(set(roots)) == len(roots)


@given(token_ids, st.integers(1, 7))
def test_block_keys_are_the_chain_of_full_blocks(ids: list[int], size: int) -> None:
    expected = []
    parent = ROOT
    for start in range(0, len(ids) // size * size, size):
        parent = child_key(parent, ids[start : start + size])
        expected.append(parent)
    assert block_keys(ROOT, ids, size) == expected


@given(token_ids, token_ids)
def test_different_ids_or_parents_have_different_keys(first: list[int], second: list[int]) -> None:
    assert (child_key(ROOT, first) == child_key(ROOT, second)) == (first == second)
    other = root_key(b"f" * 16, "k4v4", 64, "other")
    assert child_key(ROOT, first) != child_key(other, first)


@pytest.mark.parametrize("bad", [[-1], [2**32], [2**64], [1, 2, -5]])
def test_ids_that_do_not_fit_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="id"):
        block_keys(ROOT, bad, 1)


def test_a_parent_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="15 bytes"):
        child_key(b"p" * 15, [1])


def test_a_hundred_thousand_tokens_cost_calls_by_the_block_not_by_the_token() -> None:
    ids = list(range(100_000))
    num_blocks = len(ids) // 64
    assert num_calls(lambda: block_keys(ROOT, ids)) < 10 * num_blocks
    assert len(block_keys(ROOT, ids)) == num_blocks


@given(st.permutations(["a:1", "b:2", "c:3", "d:4"]), st.integers(1, 5), st.integers(0, 2**31))
def test_placement_does_not_depend_on_the_order_of_shards(
    shards: list[str], replicas: int, seed: int
) -> None:
    (key,) = random_keys(1, seed)
    homes = place(key, shards, replicas)
    assert homes == place(key, sorted(shards) * 2, replicas)
    assert len(homes) == len(set(homes)) == min(replicas, 4)
    assert homes[:1] == place(key, shards, 1)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_placement_is_balanced(count: int) -> None:
    shards = [f"127.0.0.1:{50_000 + n}" for n in range(count)]
    keys = random_keys(20_000)
    load = Counter(homes[0] for homes in place_all(keys, shards))
    expected = len(keys) / count
    # Six standard deviations of a binomial.
    assert all(abs(load[s] - expected) < 6 * expected**0.5 for s in shards), load
    seconds = Counter(homes[1] for homes in place_all(keys, shards, 2))
    assert all(abs(seconds[s] - expected) < 6 * expected**0.5 for s in shards), seconds


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_shard_that_leaves_moves_only_its_own_keys(replicas: int) -> None:
    shards = [f"10.0.0.{n}:7000" for n in range(6)]
    keys = random_keys(5_000)
    left = shards[2]
    before = place_all(keys, shards, replicas)
    after = place_all(keys, [s for s in shards if s != left], replicas)
    for old, new in zip(before, after, strict=True):
        stayed = [s for s in old if s != left]
        assert new[: len(stayed)] == stayed
        assert left in old or new == old
    moved = sum(old[0] == left for old in before)
    assert abs(moved - len(keys) / 6) < 6 * (len(keys) / 6) ** 0.5


def test_placement_of_thousands_of_keys_makes_few_calls() -> None:
    keys = random_keys(10_000)
    assert num_calls(lambda: place_all(keys, ["a:1", "b:2", "c:3"], 2)) < 5 * len(keys)


def test_placement_without_shards_is_nowhere() -> None:
    assert place_all(random_keys(2), [], 1) == [[], []]


def test_placement_refuses_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="replicas is 0"):
        place(b"k" * 16, ["a:1"], 0)
    with pytest.raises(ValueError, match="3 bytes"):
        place(b"key", ["a:1"])
