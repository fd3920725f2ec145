"""What waits between the receiver and the store, and what was lost. Never blocks its giver."""

import logging
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kvmesh.services.common import names
from kvmesh.services.traces.spans import spans_of
from kvmesh.services.traces.store import Limits, SpanStore

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 2 << 20  # of encoded requests
PRUNE_S = 5.0
RETRY_S = 1.0  # between tries to open a store that cannot be used


class Inbox:
    """A bounded queue and the thread that empties it into the store.

    Counters, kept in the store as soon as it can be written: received, dropped_full (the queue was
    full), dropped_store (the store could not be written), dropped_sender (lost before they came).
    """

    def __init__(
        self, path: Path, limits: Limits, clock: Callable[[], float] = time.time,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:  # fmt: skip
        self._path, self._limits, self._clock = path, limits, clock
        self._max_waiting = max_waiting_bytes
        self._waiting: deque[tuple[ExportTraceServiceRequest, int]] = deque()
        self._bytes = 0
        self._counts: Counter[str] = Counter()
        self._wake = threading.Condition()
        self._stopped = False
        self._store: SpanStore | None = None
        self._retry_at = 0.0
        self._prune_at = 0.0
        self._thread = threading.Thread(target=self._run, name="span-store", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, request: ExportTraceServiceRequest) -> int:
        """Takes the spans, or none of them; how many were not taken."""
        size, count = request.ByteSize(), num_spans(request)
        with self._wake:
            self._counts["received"] += count
            if self._bytes + size > self._max_waiting or self._stopped:
                self._counts["dropped_full"] += count
                return count
            self._waiting.append((request, size))
            self._bytes += size
            self._wake.notify()
        return 0

    def counts(self) -> dict[str, int]:
        """What the store does not know yet."""
        with self._wake:
            return dict(self._counts)

    def close(self) -> None:
        """Returns when all that was taken has been stored, or cannot be."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        if self._store is not None:
            self._store.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._stopped, PRUNE_S)
                if self._stopped and not self._waiting:
                    break
                taken = self._waiting.popleft() if self._waiting else None
            if taken is not None:
                self._keep(taken[0])
                with self._wake:
                    self._bytes -= taken[1]
            self._prune()
        self._flush_counts()

    def _keep(self, request: ExportTraceServiceRequest) -> None:
        records = [r for r in spans_of(request.resource_spans) if r["name"] != names.SPAN_DROPPED]
        lost = _lost_by_senders(request)
        with self._wake:
            self._counts["dropped_sender"] += lost
            counts, self._counts = self._counts, Counter()
        try:
            self._open().append(records, counts)
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            counts["dropped_store"] += len(records)
            with self._wake:
                self._counts.update(counts)

    def _open(self) -> SpanStore:
        if self._store is not None and not self._path.exists():
            self._store.close()  # the file was removed under it
            self._store = None
        if self._store is None:
            if self._clock() < self._retry_at:
                raise OSError("the span store cannot be used")
            self._store = SpanStore(self._path, self._limits)
        return self._store

    def _failed(self, error: Exception) -> None:
        if self._clock() >= self._retry_at:
            logger.warning("spans are dropped, %s cannot be written: %s", self._path, error)
            self._retry_at = self._clock() + RETRY_S
        broken = isinstance(error, sqlite3.DatabaseError) and not isinstance(
            error, sqlite3.OperationalError
        )
        if self._store is not None:
            self._store.close()
            self._store = None
        if broken:  # not a database, or a damaged one: kept aside, and begun anew
            try:
                self._path.replace(self._path.with_suffix(".damaged"))
                for suffix in ("-wal", "-shm"):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            except OSError:
                logger.warning("%s cannot be set aside", self._path)

    def _prune(self) -> None:
        now = self._clock()
        if self._store is None or now < self._prune_at:
            return
        self._prune_at = now + PRUNE_S
        try:
            self._store.prune(now)
        except sqlite3.Error as error:
            self._failed(error)

    def _flush_counts(self) -> None:
        try:
            self._open().append((), self.counts())
        except (sqlite3.Error, OSError) as error:
            self._failed(error)


def num_spans(request: ExportTraceServiceRequest) -> int:
    return sum(len(s.spans) for group in request.resource_spans for s in group.scope_spans)


def _lost_by_senders(request: ExportTraceServiceRequest) -> int:
    return sum(
        pair.value.int_value
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
        if span.name == names.SPAN_DROPPED
        for pair in span.attributes
        if pair.key == names.DROPPED
    )
