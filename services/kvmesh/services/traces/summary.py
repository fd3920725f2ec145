"""What a list shows of a trace, gathered span by span as they arrive. Pure."""

from dataclasses import dataclass, field
from typing import Any

from kvmesh.services.common import names
from kvmesh.services.traces.spans import SIMULATED

ROUTER_SERVICE = "kvmesh-router"  # where the trace of a request begins


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One trace in a list. name: of its root span; start_ns: Unix nanoseconds; others: None if
    no span said it.

    is_request: a client's request, not a probe or a look-up of the mesh's own.
    clock: measured, simulated, or mixed if it has spans of both.
    tpot_s: seconds per output token after the first.
    """

    trace_id: str
    name: str
    start_ns: int
    duration_ms: float
    num_spans: int
    members: tuple[str, ...]
    errors: int
    is_request: bool
    service: str = ""
    model: str = ""
    tenant: str = ""
    clock: str = "measured"
    ttft_s: float | None = None
    tpot_s: float | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None


@dataclass(slots=True)
class Part:
    """What one batch of spans adds to its trace. root: rank and facts of the likeliest root so far.

    rank: (place, start), the least of a trace is its root. A request's span on the router comes
    first, since it has the facts: an HTTP edge or a client may have begun the trace.
    """

    start_ns: int
    end_ns: int = 0
    num_spans: int = 0
    num_simulated: int = 0
    errors: int = 0
    num_bytes: int = 0
    rank: tuple[int, int] = (2, 1 << 62)
    root: dict[str, Any] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)
    services: set[str] = field(default_factory=set)

    def add(self, record: dict[str, Any], size: int) -> None:
        self.start_ns = min(self.start_ns, record["start_ns"])
        self.end_ns = max(self.end_ns, record["end_ns"])
        self.num_spans += 1
        self.num_simulated += clock_of(record) == SIMULATED
        self.errors += record["status"] == "ERROR"
        self.num_bytes += size
        self.members.add(record["member"])
        self.services.add(record["service"])
        rank = (_place(record), record["start_ns"])
        if rank < self.rank:
            self.rank, self.root = rank, root_facts(record)


def _place(record: dict[str, Any]) -> int:
    if record["service"] == ROUTER_SERVICE and names.OPERATION in record["attributes"]:
        return 0
    return 1 if record["parent_id"] is None else 2


def clock_of(record: dict[str, Any]) -> str:
    found = record["attributes"].get(names.CLOCK) or record["resource"].get(names.CLOCK)
    return str(found or "measured")


def root_facts(record: dict[str, Any]) -> dict[str, Any]:
    """The columns of a trace that its root span knows. Seconds, tokens, US dollars."""
    get = record["attributes"].get
    ttft, output = get(names.TIME_TO_FIRST), get(names.OUTPUT_TOKENS)
    total = (record["end_ns"] - record["start_ns"]) / 1e9
    tpot = None
    if ttft is not None and output and output > 1:
        tpot = max(0.0, total - ttft) / (output - 1)
    return {
        "name": record["name"],
        "service": record["service"],
        "model": str(get(names.RESPONSE_MODEL) or get(names.REQUEST_MODEL) or ""),
        "tenant": str(get(names.TENANT) or ""),
        "ttft_s": ttft,
        "tpot_s": tpot,
        "input_tokens": get(names.INPUT_TOKENS),
        "cached_tokens": get(names.CACHED_TOKENS),
        "output_tokens": output,
        "cost_usd": get(names.COST_USD),
    }
