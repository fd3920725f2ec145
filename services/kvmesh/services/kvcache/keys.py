"""Keys of KV blocks: who holds the same prefix computes the same key. Pure.

    root  = H("kvmesh.kv.root/1", fingerprint, codec, salt, block size), each with its length
    key 0 = H("kvmesh.kv.block/1", root,  token ids of block 0)
    key n = H("kvmesh.kv.block/1", key n-1, token ids of block n)

`codec` is the layout's codec_label, which names the codec of every layer: workers that store a
layer otherwise never share a block. H is the first 16 bytes of SHA-256: a colliding key would show
one tenant another's text, so the hash is a cryptographic one. Lengths and tags have a fixed width,
so no two inputs have the same encoding.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16
ID_BYTES = 4

_ROOT_TAG = b"kvmesh.kv.root/1"
_BLOCK_TAG = b"kvmesh.kv.block/1"
_MAX_ID = 2**32 - 1


def root_key(fingerprint: bytes, codec: str, block_size: int, salt: str) -> bytes:
    """The parent of every first block. `salt` separates tenants; empty for none."""
    parts = [_ROOT_TAG]
    for field in (fingerprint, codec.encode(), salt.encode()):
        parts += (len(field).to_bytes(8, "little"), field)
    parts.append(block_size.to_bytes(8, "little"))
    return _digest(b"".join(parts))


def child_key(parent: bytes, token_ids: Sequence[int] | npt.NDArray[np.int64]) -> bytes:
    """The key of the block of `token_ids` after `parent`.

    Raises ValueError if parent is not a key or an id does not fit 32 bits unsigned.
    """
    _check_parent(parent)
    return _digest(_BLOCK_TAG + parent + _encode(token_ids).tobytes())


def block_keys(root: bytes, token_ids: Sequence[int], block_size: int = 64) -> list[bytes]:
    """Keys of the full blocks of a sequence, first to last; a tail that is not full has none.

    Raises ValueError as `child_key`, or if block_size is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}, must be at least 1")
    _check_parent(root)
    ids = memoryview(_encode(token_ids).tobytes())
    width = block_size * ID_BYTES
    keys = []
    parent = root
    for start in range(0, len(ids) - width + 1, width):
        parent = _digest(b"".join((_BLOCK_TAG, parent, ids[start : start + width])))
        keys.append(parent)
    return keys


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:KEY_BYTES]


def _check_parent(parent: bytes) -> None:
    if len(parent) != KEY_BYTES:
        raise ValueError(f"parent has {len(parent)} bytes, a key has {KEY_BYTES}")


def _encode(token_ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    try:
        ids = np.asarray(token_ids, dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f"a token id is outside 0..{_MAX_ID}") from error
    if ids.size and (ids.min() < 0 or ids.max() > _MAX_ID):
        raise ValueError(f"token ids span {ids.min()}..{ids.max()}, allowed are 0..{_MAX_ID}")
    return ids.astype("<u4")
