"""The traces of one request inside a worker: written once, when it has ended.

One by the engine's monotonic clock, shifted to Unix time. On a simulated device also one by that
device's clock, which begins where the router says; the two are linked and share no span.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from kvmesh.services.common import names
from kvmesh.services.common.telemetry import SpanSource, Telemetry, context_of, extract, link
from kvmesh.services.worker.sequence import Finish, Sequence
from kvmesh.services.worker.timeline import SimulatedTimes, SimulatedTrace, Timeline


@dataclass(frozen=True, slots=True)
class _Clock:
    """source: of spans by this clock. unix_ns: a time of the timeline as Unix nanoseconds."""

    source: SpanSource
    unix_ns: Callable[[float], int]

    def child(self, span: trace.Span, name: str, at: float) -> trace.Span:
        return self.source.start(name, context_of(span), start_ns=self.unix_ns(at))


class RequestSpans:
    """Makes the spans of requests."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        offset_ns = time.time_ns() - time.monotonic_ns()
        self._measured = _Clock(telemetry, lambda at: int(at * 1e9) + offset_ns)

    def finish(self, span: trace.Span, sequence: Sequence) -> None:
        """Adds queue, prefill and decode below `span`, and ends it."""
        simulated, parent = sequence.simulated, sequence.work.simulated
        if simulated is not None and parent is not None:
            self._simulated(span, sequence, simulated, parent)
        prefill = _phases(self._measured, span, sequence, sequence.timeline)
        if prefill is not None:
            self._seal(prefill, sequence)
            prefill.end(self._measured.unix_ns(_first_token(sequence.timeline)))
        _end(span, sequence, None)

    def _simulated(
        self,
        span: trace.Span,
        sequence: Sequence,
        times: SimulatedTimes,
        parent: SimulatedTrace,
    ) -> None:
        """The same request by the simulated device's clock. Its KV comes before its queue."""
        origin, start_ns = times.timeline.received, parent.start_ns
        shift_ns = start_ns + round(times.transfer_s * 1e9)
        source = self._telemetry.simulated
        clock = _Clock(source, lambda at: shift_ns + round((at - origin) * 1e9))
        attributes = {names.REQUEST_ID: sequence.work.request_id}
        root = source.start(names.SPAN_WORKER, extract(parent.parent), attributes, start_ns)
        link(span, root)
        if times.transfer_bytes:
            transfer = source.start(names.SPAN_KV_FETCH, context_of(root), start_ns=start_ns)
            transfer.set_attribute(names.BYTES, times.transfer_bytes)
            transfer.end(shift_ns)
        prefill = _phases(clock, root, sequence, times.timeline)
        if prefill is not None:
            prefill.end(clock.unix_ns(_first_token(times.timeline)))
        _end(root, sequence, clock.unix_ns(_ended(times.timeline)))

    def _seal(self, prefill: trace.Span, sequence: Sequence) -> None:
        """One span for what is spread over the layers of each step: the sum, set at the end."""
        if sequence.prefill_seal_s:
            ended = _first_token(sequence.timeline)
            began = ended - sequence.prefill_seal_s
            seal = self._measured.child(prefill, names.SPAN_SEAL, began)
            seal.set_attribute(names.AGGREGATED, True)
            seal.end(self._measured.unix_ns(ended))


def _ended(times: Timeline) -> float:
    return times.ended if times.ended is not None else times.received


def _first_token(times: Timeline) -> float:
    return times.first_token if times.first_token is not None else _ended(times)


def _phases(
    clock: _Clock, span: trace.Span, sequence: Sequence, times: Timeline
) -> trace.Span | None:
    """Queue, prefill and decode by a clock. Returns the prefill, which the caller ends."""
    first_step = times.first_step if times.first_step is not None else _ended(times)
    clock.child(span, names.SPAN_QUEUE, times.received).end(clock.unix_ns(first_step))
    if times.first_step is None:
        return None
    prefill = clock.child(span, names.SPAN_PREFILL, first_step)
    prefill.set_attribute(names.TOKENS, len(sequence.work.token_ids) - sequence.cached_tokens)
    prefill.set_attribute(names.CACHED_TOKENS, sequence.cached_tokens)
    prefill.set_attribute(names.BLOCKS, sequence.sealed_here)
    if times.first_token is not None and sequence.generated > 1:
        _decode(clock, span, sequence, times)
    return prefill


def _decode(clock: _Clock, span: trace.Span, sequence: Sequence, times: Timeline) -> None:
    decode = clock.child(span, names.SPAN_DECODE, _first_token(times))
    decode.set_attribute(names.STEPS, sequence.steps)
    decode.set_attribute(names.TOKENS, sequence.generated)
    if times is sequence.timeline:
        decode.set_attribute(names.SEAL_SECONDS, sequence.decode_seal_s)
    for at, count, longest in times.marks:
        what = {names.TOKENS: count, names.LONGEST_STEP: round(longest, 9)}
        decode.add_event("token", what, timestamp=clock.unix_ns(at))
    decode.end(clock.unix_ns(_ended(times)))


def _end(span: trace.Span, sequence: Sequence, at_ns: int | None) -> None:
    finish = sequence.finish.name.lower() if sequence.finish is not None else ""
    span.set_attribute(names.OUTPUT_TOKENS, sequence.generated)
    span.set_attribute(names.FINISH_REASONS, (finish,))
    if sequence.finish is Finish.ERROR:
        span.set_status(Status(StatusCode.ERROR))
    span.end(at_ns)
