"""A router's stream at this worker, and its requests that have not ended."""

import asyncio
from dataclasses import dataclass

from opentelemetry import trace

from kvmesh.services.worker.outbox import Outbox
from kvmesh.services.worker.sequence import Sequence


@dataclass(slots=True, eq=False)
class Request:
    """One request that has not ended.

    submitted: the engine has it; before, its constraint is being compiled.
    prefilled: its sequence, once that ended as a hand-over that is still to be completed.
    task: compiles or fetches for it, or completes its hand-over.
    """

    ticket: int
    request_id: str
    session: "Session"
    span: trace.Span
    submitted: bool = False
    prefilled: Sequence | None = None
    task: asyncio.Task[None] | None = None


class Session:
    """One router's stream: what it is to be told, and its requests that have not ended."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.requests: dict[str, Request] = {}
