"""What the engine tells of a step: how busy it is, what is new, what it wants and gives. Pure."""

from dataclasses import dataclass, field

from kvmesh.backends.base import Estimate
from kvmesh.services.common.errors import MeshError
from kvmesh.services.kvcache.client import SealedBlock
from kvmesh.services.worker.blocks import CacheEvents
from kvmesh.services.worker.limits import Counters
from kvmesh.services.worker.sequence import Tail, Update, Work


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is; the fields of kvmesh.v1.LoadReport."""

    running: int
    waiting: int
    pending_prefill_tokens: int
    blocks_total: int
    blocks_free: int
    estimate: Estimate
    counters: Counters


@dataclass(frozen=True, slots=True)
class FetchWish:
    """Blocks [first, first + len(keys)) of a sequence are not here; then call `fetched`."""

    work: Work
    first: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    """Sealed blocks for the shards. tail: of a hand-over, whose last export this then is."""

    work: Work
    blocks: tuple[SealedBlock, ...]
    handover: bool = False
    tail: Tail | None = None


@dataclass(slots=True)
class Outcome:
    """What a step, or a round of exports, brought. Each part in the order it happened."""

    load: Load
    events: CacheEvents
    updates: list[Update] = field(default_factory=list)
    refusals: list[tuple[int, MeshError]] = field(default_factory=list)  # ticket, why
    wishes: list[FetchWish] = field(default_factory=list)
    exports: list[Exported] = field(default_factory=list)
