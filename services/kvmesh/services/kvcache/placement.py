"""Which shards hold a block: rendezvous (highest random weight) hashing. Pure.

Each (key, shard) pair has a pseudo-random weight, and a block lives on the shards of the highest
ones. So everyone who knows the same shards agrees without talking, and a shard that leaves or joins
moves only its own share of the keys.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.services.kvcache.keys import KEY_BYTES

_Words = npt.NDArray[np.uint64]

# The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection that mixes all 64 bits.
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def place(key: bytes, shards: Sequence[str], replicas: int = 1) -> list[str]:
    """The shards of one key, the preferred one first; see `place_all`."""
    return place_all([key], shards, replicas)[0]


def place_all(keys: Sequence[bytes], shards: Sequence[str], replicas: int = 1) -> list[list[str]]:
    """For each key its `replicas` shards, the preferred one first; fewer if there are fewer.

    The order of `shards` and repetitions in it do not matter. About 0.3 us per key and shard.
    Raises ValueError if replicas is below 1 or a key has a wrong length.
    """
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}, must be at least 1")
    for key in keys:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {len(key)} bytes, must have {KEY_BYTES}")
    names = sorted(set(shards))  # equal weights, if ever, are then equally decided everywhere
    if not names:
        return [[] for _ in keys]
    weights = _weights(keys, names)
    best = np.argsort(~weights, axis=1, kind="stable")[:, :replicas]
    return [[names[column] for column in row] for row in best.tolist()]


def _weights(keys: Sequence[bytes], names: Sequence[str]) -> _Words:
    """uint64 [keys, names]."""
    words = np.frombuffer(b"".join(keys), dtype="<u8").astype(np.uint64).reshape(len(keys), 2)
    seeds = np.array([_seed(name) for name in names], dtype=np.uint64)
    return _mix(words[:, 1:] ^ _mix(words[:, :1] ^ seeds[None, :]))


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mix(words: _Words) -> _Words:
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        words = (words ^ (words >> shift)) * multiplier
    return words ^ (words >> _SHIFTS[2])
