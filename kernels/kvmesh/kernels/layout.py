"""Where things lie in a sealed block (see block.py for the bytes)."""

from dataclasses import dataclass

BLOCK_SIZE = 64  # tokens; the same in every process of every mesh, part of the block format


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Geometry of one model's blocks under one codec.

    fingerprint: 16 bytes that say which model (weights, config, centers) the K and V come from.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    codec: str
    fingerprint: bytes
