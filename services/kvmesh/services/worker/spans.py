"""The trace of one request inside a worker: written once, when it has ended.

Times come from the engine's monotonic clock, shifted to Unix time.
"""

import time

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from kvmesh.services.common import names
from kvmesh.services.common.telemetry import Telemetry, context_of
from kvmesh.services.worker.sequence import Finish, Sequence


class RequestSpans:
    """Makes the spans of requests. clock_offset_ns: Unix time minus the engine's clock."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def finish(self, span: trace.Span, sequence: Sequence) -> None:
        """Adds queue, prefill and decode below `span`, and ends it."""
        times, work = sequence.timeline, sequence.work
        ended = times.ended if times.ended is not None else times.received
        first_step = times.first_step if times.first_step is not None else ended
        self._child(span, names.SPAN_QUEUE, (times.received, first_step)).end(self._ns(first_step))
        if times.first_step is not None:
            first_token = times.first_token if times.first_token is not None else ended
            prefill = self._child(span, names.SPAN_PREFILL, (first_step, first_token))
            prefill.set_attribute(names.TOKENS, len(work.token_ids) - sequence.cached_tokens)
            prefill.set_attribute(names.CACHED_TOKENS, sequence.cached_tokens)
            prefill.set_attribute(names.BLOCKS, sequence.sealed_here)
            self._seal(prefill, sequence, first_token)
            prefill.end(self._ns(first_token))
        if times.first_token is not None and sequence.generated > 1:
            decode = self._child(span, names.SPAN_DECODE, (times.first_token, ended))
            decode.set_attribute(names.STEPS, sequence.steps)
            decode.set_attribute(names.TOKENS, sequence.generated)
            decode.set_attribute(names.SEAL_SECONDS, sequence.decode_seal_s)
            for at, count, longest in times.marks:
                what = {names.TOKENS: count, names.LONGEST_STEP: round(longest, 6)}
                decode.add_event("token", what, timestamp=self._ns(at))
            decode.end(self._ns(ended))
        finish = sequence.finish.name.lower() if sequence.finish is not None else ""
        span.set_attribute(names.OUTPUT_TOKENS, sequence.generated)
        span.set_attribute(names.FINISH_REASONS, (finish,))
        if sequence.finish is Finish.ERROR:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def _seal(self, prefill: trace.Span, sequence: Sequence, first_token: float) -> None:
        """One span for what is spread over the layers of each step: the sum, set at the end."""
        if sequence.prefill_seal_s:
            began = first_token - sequence.prefill_seal_s
            seal = self._child(prefill, names.SPAN_SEAL, (began, first_token))
            seal.set_attribute(names.AGGREGATED, True)
            seal.end(self._ns(first_token))

    def _child(self, span: trace.Span, name: str, times: tuple[float, float]) -> trace.Span:
        return self._telemetry.start(name, context_of(span), start_ns=self._ns(times[0]))

    def _ns(self, at: float) -> int:
        return int(at * 1e9) + self._offset_ns
