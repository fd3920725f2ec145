"""Takes finished spans from requests and sends them elsewhere, in a thread of its own.

A request only ever appends to a bounded queue. What finds it full, or cannot be sent, is dropped
and counted, and the count goes out with the next spans that arrive.
"""

import logging
import secrets
import threading
import time
from collections import deque

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags

from kvmesh.services.common import names

logger = logging.getLogger(__name__)

MAX_QUEUE = 8_192
MAX_BATCH = 512
DELAY_S = 0.5  # how long a span waits for others to go with
CLOSE_S = 3.0  # for what is left at the end


class SpanSender(SpanProcessor):
    """One exporter and its queue. dropped: spans lost since the start.

    tell_losses: sends the count as a span named `spans dropped`, which the receiver takes out.
    """

    def __init__(
        self, exporter: SpanExporter, tell_losses: bool = False, max_queue: int = MAX_QUEUE
    ) -> None:
        self.dropped = 0
        self._exporter = exporter
        self._tell_losses = tell_losses
        self._told = 0
        self._max_queue = max_queue
        self._queue: deque[ReadableSpan] = deque()
        self._wake = threading.Condition()
        self._sending = False
        self._flush = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="span-sender", daemon=True)
        self._thread.start()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        pass

    def on_end(self, span: ReadableSpan) -> None:
        with self._wake:
            if self._stopped or len(self._queue) >= self._max_queue:
                self.dropped += 1
                return
            self._queue.append(span)
            if len(self._queue) >= MAX_BATCH:
                self._wake.notify_all()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Until all that has ended has been sent or dropped; False if it took too long."""
        with self._wake:
            self._flush = True
            self._wake.notify_all()
            return self._wake.wait_for(
                lambda: not self._queue and not self._sending, timeout_millis / 1e3
            )

    def shutdown(self) -> None:
        """Sends what is left, for at most 3 s. Twice is safe."""
        with self._wake:
            if self._stopped:
                return
            self._stopped = True
            self._wake.notify_all()
        self._thread.join(CLOSE_S)
        self._exporter.shutdown()  # gives up what still waits to be tried again
        if self.dropped:
            logger.warning("%d spans were dropped", self.dropped)

    def _run(self) -> None:
        deadline = time.monotonic() + DELAY_S
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._stopped or self._flush or len(self._queue) >= MAX_BATCH,
                    max(0.0, deadline - time.monotonic()),
                )
                deadline = time.monotonic() + DELAY_S
                stopped = self._stopped
                batch = [self._queue.popleft() for _ in range(min(MAX_BATCH, len(self._queue)))]
                self._sending = bool(batch)
                self._flush = self._flush and bool(batch)
            if batch:
                self._send(batch)
            with self._wake:
                self._sending = False
                if stopped and not self._queue:
                    self._wake.notify_all()
                    return
                if not self._queue:
                    self._wake.notify_all()

    def _send(self, batch: list[ReadableSpan]) -> None:
        lost = self.dropped - self._told if self._tell_losses else 0
        extra = [_loss(batch[0], lost)] if lost else []
        try:
            sent = self._exporter.export([*batch, *extra]) is SpanExportResult.SUCCESS
        except Exception:
            logger.exception("spans could not be sent")
            sent = False
        if sent:
            self._told += lost
        else:
            with self._wake:
                self.dropped += len(batch)


def _loss(beside: ReadableSpan, count: int) -> ReadableSpan:
    now = time.time_ns()
    context = SpanContext(
        secrets.randbits(128), secrets.randbits(64), False, TraceFlags(TraceFlags.SAMPLED)
    )
    return ReadableSpan(
        names.SPAN_DROPPED,
        context,
        resource=beside.resource,
        attributes={names.DROPPED: count},
        start_time=now,
        end_time=now,
    )
