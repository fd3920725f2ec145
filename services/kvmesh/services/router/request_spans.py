"""The spans of one request at the router. No span per token: all text is one span."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.json_format import MessageToDict
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Status, StatusCode

from kvmesh.services.common import names
from kvmesh.services.common.errors import MeshError
from kvmesh.services.common.telemetry import Telemetry, context_of, inject, link, trace_id_of
from kvmesh.services.router.bill import HOUR_S, MIXED, SIMULATED
from kvmesh.services.router.core import Decision
from kvmesh.services.router.cost import Candidate
from kvmesh.services.router.prepare import Prepared
from kvmesh.v1 import common_pb2, inference_pb2, worker_pb2


class RequestSpans:
    """The root span and its children; `end` ends what is still open."""

    def __init__(
        self, telemetry: Telemetry, request: inference_pb2.GenerateRequest, parent: Context
    ) -> None:
        self._telemetry = telemetry
        self._start_ns = time.time_ns()
        self._twin: trace.Span | None = None  # the root by the simulated devices' clocks
        self._root = telemetry.start(
            f"{names.SPAN_REQUEST} {request.model}".rstrip(),
            parent,
            {names.OPERATION: "chat", names.PROVIDER: "kvmesh", names.REQUEST_MODEL: request.model},
        )
        self._below = context_of(self._root)
        self._facts: dict[str, str | int | float] = {}  # of the request, for both roots
        self._handover: trace.Span | None = None
        self._text: trace.Span | None = None
        self.texts = 0  # messages of new text
        self.trace_id = trace_id_of(self._root)
        carrier = dict(inject(self._below))
        self.context = common_pb2.TraceContext(
            traceparent=carrier.get("traceparent", ""), tracestate=carrier.get("tracestate", "")
        )

    def of_tenant(self, name: str) -> None:
        self._facts[names.TENANT] = name
        self._root.set_attribute(names.TENANT, name)

    def simulated(self, after_s: float) -> worker_pb2.SimulatedTrace:
        """For a stay on a simulated device, which begins so long after the arrival."""
        if self._twin is None:
            self._twin = self._telemetry.simulated.start(
                names.SPAN_REQUEST, Context(), start_ns=self._start_ns
            )
            link(self._root, self._twin)
        carrier = dict(inject(context_of(self._twin)))
        return worker_pb2.SimulatedTrace(
            context=common_pb2.TraceContext(
                traceparent=carrier.get("traceparent", ""),
                tracestate=carrier.get("tracestate", ""),
            ),
            start_ns=self._start_ns + round(after_s * 1e9),
        )

    @contextmanager
    def tokenize(self) -> Iterator[trace.Span]:
        """The tokenizer's own span becomes a child of this one."""
        with self._child(names.SPAN_TOKENIZE) as span, trace.use_span(span, record_exception=False):
            yield span

    @contextmanager
    def route(self) -> Iterator[trace.Span]:
        with self._child(names.SPAN_ROUTE) as span:
            yield span

    @contextmanager
    def migrate(self, why: MeshError | None) -> Iterator[trace.Span]:
        with self._child(names.SPAN_MIGRATE) as span:
            span.set_attribute(names.REASON, str(why or ""))
            yield span

    def prepared(self, prepared: Prepared) -> None:
        """What is known once the prompt has been encoded."""
        self._root.update_name(f"{names.SPAN_REQUEST} {prepared.model.name}")
        self._facts |= {
            names.REQUEST_MODEL: prepared.model.name,
            names.RESPONSE_MODEL: prepared.model.name,
            names.REQUEST_ID: prepared.request_id,
            names.RESPONSE_ID: prepared.wire_id,
            names.INPUT_TOKENS: len(prepared.prompt),
            names.TEMPERATURE: prepared.settings.temperature,
            names.MAX_TOKENS: prepared.max_tokens,
            names.SEED: str(prepared.sampling.seed),  # may be over an attribute's 63 bits
        }
        self._root.set_attributes(self._facts)

    def decided(self, span: trace.Span, decision: Decision) -> None:
        span.set_attribute(names.REASON, decision.reason)
        span.set_attribute(names.CANDIDATES, json.dumps([_brief(c) for c in decision.candidates]))
        if decision.chosen is not None:
            span.set_attribute(names.PREDICTED, decision.chosen.total_s)

    def handed_over(self, source: str, target: str) -> None:
        """The prefill worker is done; lasts until the decode worker's first token."""
        self._handover = self._telemetry.start(
            names.SPAN_HANDOVER, self._below, {names.WORKER: f"{source} > {target}"}
        )

    def first_token(self) -> None:
        """A leg's first token came."""
        if self._text is None:
            self._text = self._telemetry.start(names.SPAN_DETOKENIZE, self._below)
        self._end_handover()

    def failed(self, error: MeshError) -> None:
        self._root.set_status(Status(StatusCode.ERROR, str(error)))

    def end(self, usage: inference_pb2.Usage, finish: common_pb2.FinishReason.ValueType) -> None:
        self._end_handover()
        if self._text is not None:
            self._text.set_attribute(names.TOKENS, usage.completion_tokens)
            self._text.set_attribute(names.STEPS, self.texts)
            self._text.end()
        reason = common_pb2.FinishReason.Name(finish).removeprefix("FINISH_REASON_").lower()
        self._root.set_attributes(
            {
                names.FINISH_REASONS: [reason],
                names.OUTPUT_TOKENS: usage.completion_tokens,
                names.CACHED_TOKENS: usage.cached_tokens,
                names.TIME_TO_FIRST: usage.ttft_s,
                names.MIGRATIONS: usage.migrations,
                names.WORKER: usage.decode_worker,
            }
        )
        cost = _cost(usage)
        if self._twin is not None:
            self._end_twin(self._twin, usage, reason, cost)
        self._root.set_attributes(cost)
        self._root.end()

    def _end_twin(
        self,
        twin: trace.Span,
        usage: inference_pb2.Usage,
        reason: str,
        cost: dict[str, str | float],
    ) -> None:
        model = self._facts.get(names.RESPONSE_MODEL, "")
        twin.update_name(f"{names.SPAN_REQUEST} {model}".rstrip())
        twin.set_attributes(
            {
                **self._facts,
                names.OPERATION: "chat",
                names.PROVIDER: "kvmesh",
                names.FINISH_REASONS: [reason],
                names.OUTPUT_TOKENS: usage.completion_tokens,
                names.CACHED_TOKENS: usage.cached_tokens,
                names.TIME_TO_FIRST: usage.simulated_ttft_s,
                names.MIGRATIONS: usage.migrations,
                names.WORKER: usage.decode_worker,
                **cost,
            }
        )
        twin.end(self._start_ns + round(usage.simulated_duration_s * 1e9))

    def _end_handover(self) -> None:
        if self._handover is not None:
            self._handover.end()
            self._handover = None

    @contextmanager
    def _child(self, name: str) -> Iterator[trace.Span]:
        span = self._telemetry.start(name, self._below)
        try:
            yield span
        except MeshError as error:
            span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            span.end()


def _cost(usage: inference_pb2.Usage) -> dict[str, str | float]:
    """What the request took of devices. Without the sums if they would mix two clocks."""
    if not usage.devices:
        return {}
    stays = [MessageToDict(stay, preserving_proto_field_name=True) for stay in usage.devices]
    found: dict[str, str | float] = {
        names.COST_KIND: usage.cost_kind,
        names.COST_DEVICES: json.dumps(stays),
    }
    if usage.cost_kind == MIXED:
        return found
    found[names.COST_DEVICE] = usage.device_s
    if usage.HasField("cost_split"):
        split = usage.cost_split
        parts = (split.queue_usd, split.prefill_usd, split.decode_usd, split.kv_usd)
        found |= dict(zip(names.COST_SPLIT, parts, strict=True))
        found[names.COST_USD] = usage.cost_usd
        prices = {stay.price_usd_h for stay in usage.devices}
        # Of workers with different prices: their mean, by device seconds.
        mean = usage.cost_usd / usage.device_s * HOUR_S if usage.device_s else 0.0
        found[names.COST_PRICE] = prices.pop() if len(prices) == 1 else mean
    if usage.cost_kind == SIMULATED:
        found[names.SIMULATED_FIRST] = usage.simulated_ttft_s
        found[names.SIMULATED_DURATION] = usage.simulated_duration_s
    return found


def _brief(candidate: Candidate) -> dict[str, object]:
    found: dict[str, object] = {
        "prefill": candidate.prefill_worker,
        "decode": candidate.decode_worker,
        "total_s": round(candidate.total_s, 6),
        "queue_s": round(candidate.queue_s, 6),
        "prefill_s": round(candidate.prefill_s, 6),
        "transfer_s": round(candidate.transfer_s, 6),
        "decode_s": round(candidate.decode_s, 6),
        "cached": candidate.prompt.local + candidate.prompt.remote,
        "uncached": candidate.prompt.uncached,
    }
    if candidate.rejected:
        found["rejected"] = candidate.rejected
    return found
