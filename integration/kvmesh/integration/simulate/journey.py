"""The life of one request in the simulated mesh; what services/router/generation.py does live."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from kvmesh.integration.simulate.arrivals import SimRequest
from kvmesh.integration.simulate.record import RequestRecord
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.sampling import SamplingSettings
from kvmesh.services.kvcache.keys import KEY_BYTES
from kvmesh.services.router.core import RouteQuery
from kvmesh.services.router.cost import Candidate
from kvmesh.services.worker.sequence import Fetched, Tail, Work

ROOT = bytes(KEY_BYTES)
_LEAST = 1 << 16


@dataclass(slots=True)
class Journey:
    """worker: where it is now; empty between two. decode_worker: where it goes after a prefill."""

    request: SimRequest
    record: RequestRecord
    worker: str = ""
    decode_worker: str = ""
    prefill_only: bool = False
    excluded: frozenset[str] = frozenset()
    tokens: int = field(init=False)  # prompt and output so far

    def __post_init__(self) -> None:
        self.tokens = self.request.input_tokens

    @property
    def name(self) -> str:
        return f"r{self.request.index}"

    def query(self, handover: bool) -> RouteQuery:
        return RouteQuery(
            self.name,
            self.tokens,
            self.request.keys,
            self.request.output_tokens - self.record.output_tokens,
            self.excluded,
            handover,
        )

    def work(self, prefill_only: bool, tail_address: str) -> Work:
        return Work(
            ticket=self.request.index,
            request_id=self.name,
            token_ids=_unknown(self.tokens),
            num_prompt=self.request.input_tokens,
            settings=SamplingSettings(max_tokens=self.request.output_tokens, ignore_eos=True),
            root=ROOT,
            prefill_only=prefill_only,
            tail_address=tail_address,
            keys=self.request.keys,
        )

    def handed_over(self, missing: range) -> Fetched:
        """All blocks that are missing, and the tail."""
        start = (self.tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
        rest = self.tokens - 1 - start
        tail = Tail(start, rest, b"") if rest else None
        return Fetched(dict.fromkeys(missing, b""), tail)

    def start(self, chosen: Candidate) -> None:
        self.decode_worker = chosen.decode_worker
        self.record.decode_worker = chosen.decode_worker
        self.record.prefill_worker = chosen.prefill_worker


def _unknown(count: int) -> Sequence[int]:
    """So many token ids. Nothing looks at them: keys say which blocks are alike."""
    size = max(_LEAST, 1 << count.bit_length())
    return _zeros(size)[:count]


@cache
def _zeros(size: int) -> Sequence[int]:
    """Read-only, so that all requests can have a view of the same ones."""
    return memoryview(bytes(8 * size)).cast("q")
