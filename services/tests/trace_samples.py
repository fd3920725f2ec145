"""Hand-made traces, as the receiver gives them to the store."""

import json
from typing import Any

MS = 1_000_000
START = 1_700_000_000_000 * MS  # Unix nanoseconds


def record(
    trace: str, span: str, parent: str | None, times: tuple[float, float], **more: Any
) -> dict[str, Any]:
    """trace, span: any short text. times: (start, end), ms after START."""
    member = more.pop("member", "router")
    clock = more.pop("clock", "measured")
    service = f"kvmesh-{member.partition('-')[0]}"
    return {
        "trace_id": trace.encode().hex().ljust(32, "0"),
        "span_id": span.encode().hex().ljust(16, "0")[:16],
        "parent_id": parent.encode().hex().ljust(16, "0")[:16] if parent else None,
        "name": span,
        "service": service,
        "member": member,
        "start_ns": START + int(times[0] * MS),
        "end_ns": START + int(times[1] * MS),
        "status": "UNSET",
        "status_message": "",
        "attributes": {},
        "events": [],
        "links": [],
        "resource": {
            "service.name": service,
            "service.instance.id": member,
            "kvmesh.clock": clock,
        },
        **more,
    }


def trace_id(trace: str) -> str:
    return trace.encode().hex().ljust(32, "0")


CANDIDATES = [
    {"prefill": "worker-0", "decode": "worker-1", "total_s": 0.04, "queue_s": 0.004,
     "prefill_s": 0.03, "transfer_s": 0.005, "decode_s": 0.001, "cached": 0, "uncached": 900},
    {"prefill": "", "decode": "worker-1", "total_s": 0.09, "queue_s": 0.02,
     "prefill_s": 0.06, "transfer_s": 0.0, "decode_s": 0.01, "cached": 0, "uncached": 900},
]  # fmt: skip


def request(trace: str, at: float = 0.0, slow: float = 1.0, **more: Any) -> list[dict[str, Any]]:
    """A request of 100 ms times `slow`: TTFT 50 ms, eleven tokens, a stall before the ninth."""
    cached, clock = more.pop("cached", 0), more.pop("clock", "measured")

    def span(name: str, parent: str | None, start: float, end: float, **extra: Any):
        times = (at + start * slow, at + end * slow)
        return record(trace, name, parent, times, **{"clock": clock, **extra})

    def mark(ms: float, count: int, longest: float) -> dict[str, Any]:
        attributes = {"kvmesh.tokens": count, "kvmesh.decode.longest_s": longest * slow / 1e3}
        return {"name": "token", "time_ns": START + int((at + ms * slow) * MS),
                "attributes": attributes}  # fmt: skip

    root = {
        "gen_ai.request.model": "mini",
        "gen_ai.response.time_to_first_chunk": 0.05 * slow,
        "gen_ai.usage.input_tokens": 900,
        "gen_ai.usage.cache_read.input_tokens": cached,
        "gen_ai.usage.output_tokens": 11,
        **more.pop("attributes", {}),
    }
    marks = [mark(54, 3, 2.0), mark(58, 5, 2.0), mark(62, 7, 2.0), mark(92, 9, 28.0),
             mark(98, 11, 3.0)]  # fmt: skip
    kv = {"kvmesh.kv.bytes": 1000, "kvmesh.kv.raw_bytes": 4000}
    route = {"kvmesh.route.candidates": json.dumps(CANDIDATES), "kvmesh.route.reason": "least"}
    worker: dict[str, Any] = {"member": "worker-1"}
    return [
        span("chat mini", None, 0, 100, attributes=root, **more),
        span("tokenize", "chat mini", 0, 5),
        span("route", "chat mini", 5, 7, attributes=route),
        span("run", "chat mini", 8, 99, **worker),
        span("queue", "run", 9, 18, **worker),
        span("kv fetch", "run", 10, 16, attributes=kv, **worker),
        span("prefill", "run", 18, 48, **worker),
        span("decode", "run", 50, 98, events=marks, **worker),
    ]
