"""One stay of a request on one worker."""

from dataclasses import dataclass
from typing import Protocol

from kvmesh.services.common.errors import MeshError, from_status
from kvmesh.services.router.worker_link import WorkerLink
from kvmesh.services.router.workers import WorkerTable
from kvmesh.v1 import common_pb2, worker_pb2


class Traveller(Protocol):
    """The request that stays there."""

    def on_update(self, leg: "Leg", update: worker_pb2.TokenUpdate) -> None: ...

    def on_lost(self, leg: "Leg") -> None: ...


class Leg:
    """From Submit to the last update, to a broken stream, or to `release`, whatever is first."""

    def __init__(
        self, traveller: Traveller, link: WorkerLink, table: WorkerTable, prefill_only: bool
    ) -> None:
        self.worker = link.member.member_id
        self.prefill_only = prefill_only
        self.answered = False  # its first token has come
        self._traveller = traveller
        self._link = link
        self._table = table
        self._request_id = ""

    def begin(self, submit: worker_pb2.Submit, uncached_tokens: int) -> None:
        """Raises Unavailable if the worker's stream is not open."""
        self._link.submit(submit, self)
        self._request_id = submit.request_id
        self._table.sent(self.worker, submit.request_id, uncached_tokens)

    def first_token(self) -> None:
        self.answered = True
        self._table.first_token(self.worker, self._request_id)

    def on_update(self, update: worker_pb2.TokenUpdate) -> None:
        if update.finish_reason:
            self._table.ended(self.worker, self._request_id)
        self._traveller.on_update(self, update)

    def on_lost(self) -> None:
        self._traveller.on_lost(self)

    def release(self) -> None:
        """Cancels what still runs there. Twice is safe."""
        self._link.release(self._request_id)
        self._table.ended(self.worker, self._request_id)


@dataclass(frozen=True, slots=True)
class LegEnd:
    """A leg ended and its request did not. reason: unspecified if the worker went away."""

    leg: Leg
    reason: common_pb2.FinishReason.ValueType
    error: MeshError | None


def error_of(update: worker_pb2.TokenUpdate) -> MeshError | None:
    """The error that an update carries; None if it has none."""
    if not update.HasField("error"):
        return None
    error = update.error
    return from_status(error.code, error.message, error.retry_after_ms)
