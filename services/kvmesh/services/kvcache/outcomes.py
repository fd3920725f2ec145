"""What the block store answers. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LookupResult:
    """held: one per key asked. lease_id: empty if none was asked for or nothing is held."""

    held: list[bool]
    num_prefix: int
    lease_id: str


@dataclass(frozen=True, slots=True)
class PutOutcome:
    """stored: False if the block was held already. evicted: keys that made room for it."""

    stored: bool
    evicted: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Content now, and counts since the start. Bytes are those of blocks, not of our overhead."""

    blocks: int
    bytes_used: int
    bytes_budget: int
    hits: int
    misses: int
    puts: int
    evictions: int
    leases: int
    leased_blocks: int
