"""The life of one Generate: prompt to tokens, a place to run, text, moves, exactly one end.

Workers' answers and text come as callbacks in the event loop; they are noted at once, and what the
caller has to hear goes through one queue.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from opentelemetry.context import Context

from kvmesh.services.common.api_keys import Tenant
from kvmesh.services.common.errors import Expired, MeshError, Overloaded, Unavailable
from kvmesh.services.router.bill import Bill
from kvmesh.services.router.core import Decision
from kvmesh.services.router.cost import Candidate
from kvmesh.services.router.leg import Leg, LegEnd, error_of
from kvmesh.services.router.parts import RouterParts, prepare_request
from kvmesh.services.router.place import Place
from kvmesh.services.router.prepare import Prepared
from kvmesh.services.router.request_metrics import RequestEnd
from kvmesh.services.router.request_spans import RequestSpans
from kvmesh.services.router.tokens import Speech, Text
from kvmesh.v1 import common_pb2, inference_pb2, worker_pb2

WORKER_WAIT_S = 30.0  # for a worker to come back, when a running request has lost its last one

_RETRY_ELSEWHERE = (Unavailable, Overloaded)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came. tenant: None for the operator's own. parent: the caller's trace."""

    tenant: Tenant | None
    request: inference_pb2.GenerateRequest
    parent: Context


class Generation:
    """One request from arrival to its end. `run` is called once."""

    def __init__(self, parts: RouterParts, asked: Asked, timeout_s: float) -> None:
        self._parts = parts
        self._tenant = asked.tenant
        self._request = asked.request
        self._arrived = parts.clock()
        self._deadline = self._arrived + timeout_s
        self._spans = RequestSpans(parts.telemetry, asked.request, asked.parent)
        if asked.tenant is not None:
            self._spans.of_tenant(asked.tenant.name)
        self._place = Place(parts, asked.tenant)
        self._inbox: asyncio.Queue[Text | LegEnd | MeshError] = asyncio.Queue()
        self._output: list[int] = []
        self._logprobs: list[common_pb2.TokenLogprob] = []
        self._speech: Speech | None = None
        self._leg: Leg | None = None
        self._decode_worker = ""
        self._finish = common_pb2.FINISH_REASON_UNSPECIFIED
        self._usage = inference_pb2.Usage()
        self._bill = Bill()
        self._reported = 0  # output tokens that the caller has been told of
        self._responses = 0
        self._excluded: frozenset[str] = frozenset()
        self._model = ""

    async def run(self) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Ends after one response with finish_reason, or raises a MeshError; never both."""
        parts = self._parts
        timer = asyncio.get_running_loop().call_later(
            self._deadline - self._arrived, self._inbox.put_nowait, self._expired()
        )
        finished = False
        failure = "Cancelled"
        try:
            if parts.draining:
                raise Unavailable("this router drains; send the request elsewhere")
            self._place.take()
            prepared = await self._prepare()
            self._place.hold(len(prepared.prompt) + prepared.max_tokens)
            self._begin(prepared)
            async with aclosing(self._respond(prepared)) as responses:  # type: ignore[type-var]
                async for response in responses:
                    finished = bool(response.finish_reason)
                    yield response
        except MeshError as error:
            self._spans.failed(error)
            failure = type(error).__name__
            raise
        finally:
            timer.cancel()
            self._place.leave(self._used(), finished)
            self._bill.fill(self._usage)
            parts.metrics.ended(self._end("" if finished else failure))
            self._release()
            self._spans.end(self._usage, self._finish)
            if parts.draining and not parts.admission.active:
                parts.idle.set()

    def on_update(self, leg: Leg, update: worker_pb2.TokenUpdate) -> None:
        """New tokens of the present leg, or its end."""
        if leg is not self._leg or self._speech is None:
            return
        if update.HasField("device"):
            self._bill.note(update.device)
        if update.token_ids:
            if not leg.answered:
                self._first_of(leg, update)
            self._output.extend(update.token_ids)
            self._logprobs.extend(update.logprobs)
        reason = update.finish_reason
        if reason in (common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH):
            self._finish = reason
            self._speech.ending = True
        elif reason:
            self._inbox.put_nowait(LegEnd(leg, reason, error_of(update)))
        if update.token_ids or self._speech.ending:
            self._usage.duration_s = self._parts.clock() - self._arrived
            self._parts.fleet.tokenizers.say(self._speech)

    def on_lost(self, leg: Leg) -> None:
        """The stream of the leg's worker broke."""
        if leg is self._leg and not self._finish:
            lost = Unavailable(f"{leg.worker} went away")
            self._inbox.put_nowait(LegEnd(leg, common_pb2.FINISH_REASON_UNSPECIFIED, lost))

    def _expired(self) -> Expired:
        seconds = self._deadline - self._arrived
        return Expired(f"the request did not end within its {seconds:.3f} s")

    async def _prepare(self) -> Prepared:
        with self._spans.tokenize() as span:
            prepared = await prepare_request(
                self._parts, self._request, self._tenant, self._left_s()
            )
            span.set_attribute("kvmesh.tokens", len(prepared.prompt))
        self._spans.prepared(prepared)
        self._model = prepared.model.name
        return prepared

    def _begin(self, prepared: Prepared) -> None:
        """Raises Overloaded or Unavailable if no worker can take it now."""
        self._usage.prompt_tokens = len(prepared.prompt)
        self._usage.seed = prepared.sampling.seed
        decision = self._choose(prepared, handover=True)
        if decision.chosen is None:
            raise Unavailable(decision.reason)
        self._parts.admission.check_wait(decision.chosen.queue_s)
        self._speech = Speech(
            prepared.wire_id, prepared.settings, self._output, self._inbox.put_nowait
        )
        self._start(prepared, decision.chosen)

    async def _respond(self, prepared: Prepared) -> AsyncIterator[inference_pb2.GenerateResponse]:
        while True:
            event = await self._inbox.get()
            if isinstance(event, Text):
                response = self._said(prepared, event)
                if response.finish_reason:
                    yield response
                    return
                if response.text or response.token_ids or response.logprobs:
                    yield response
            elif isinstance(event, LegEnd):
                if event.leg is self._leg:
                    await self._move(prepared, event)
            else:
                raise event

    def _said(self, prepared: Prepared, event: Text) -> inference_pb2.GenerateResponse:
        if event.error is not None:
            raise event.error
        # A tokenizer that repeats after a restart counts from the first id again.
        upto = max(self._reported, event.num_tokens)
        response = inference_pb2.GenerateResponse(text=event.text)
        if self._request.echo_token_ids:
            response.token_ids.extend(self._output[self._reported : upto])
        if self._logprobs:
            response.logprobs.extend(self._logprobs[self._reported : upto])
        self._reported = upto
        if event.final:
            self._finish = common_pb2.FINISH_REASON_STOP if event.stopped else self._finish
            response.finish_reason = self._finish
            self._usage.completion_tokens = upto
            self._bill.fill(self._usage)
            response.usage.CopyFrom(self._usage)
        self._spans.texts += 1
        if event.final or not self._responses:
            response.request_id = prepared.request_id
            response.trace_id = self._spans.trace_id
        if response.text or response.token_ids or event.final:
            self._responses += 1
        return response

    async def _move(self, prepared: Prepared, end: LegEnd) -> None:
        """The present leg is over and the request is not: where it goes on."""
        leg = end.leg
        leg.release()
        if end.reason == common_pb2.FINISH_REASON_HANDOVER:
            self._spans.handed_over(leg.worker, self._decode_worker)
            worker = self._parts.fleet.workers.get(leg.worker)
            tail = worker.member.address if worker is not None else ""
            await self._go_on(prepared, self._decode_worker, tail)
            return
        lost = end.error or Unavailable(f"{leg.worker} ended the request unasked")
        if end.reason == common_pb2.FINISH_REASON_ERROR and not leg.prefill_only:
            if not isinstance(lost, _RETRY_ELSEWHERE):
                raise lost
            self._excluded |= {leg.worker}
            if isinstance(lost, Unavailable):
                self._count_migration(lost)
            elif self._choose(prepared, handover=False).chosen is None:
                raise lost
        elif end.reason != common_pb2.FINISH_REASON_ERROR:
            self._count_migration(lost)
        # What a prefill worker could not do, the decode worker does.
        await self._go_on(prepared, self._decode_worker if leg.prefill_only else "", "", lost)

    def _count_migration(self, lost: MeshError) -> None:
        limit = self._parts.config.max_migrations
        if self._usage.migrations >= limit:
            raise Unavailable(f"{lost}, after {limit} migrations (max_migrations)")
        self._usage.migrations += 1
        self._parts.migrations += 1

    async def _go_on(
        self, prepared: Prepared, wanted: str, tail: str, why: MeshError | None = None
    ) -> None:
        """Submits prompt and output so far to `wanted`, or to another worker."""
        state = self._parts.core.workers.get(wanted)
        if state is not None and state.connected and wanted not in self._excluded:
            self._send(prepared, wanted, tail_address=tail)
            return
        with self._spans.migrate(why):
            chosen = await self._wait_for_worker(prepared)
        self._send(prepared, chosen.decode_worker, uncached=chosen.prompt.uncached)

    async def _wait_for_worker(self, prepared: Prepared) -> Candidate:
        left_s = self._left_s()
        decision = self._choose(prepared, handover=False)
        try:
            async with asyncio.timeout(min(WORKER_WAIT_S, left_s)):
                while decision.chosen is None:
                    self._excluded = frozenset()
                    await self._parts.fleet.wait_changed()
                    decision = self._choose(prepared, handover=False)
        except TimeoutError as error:
            if left_s <= WORKER_WAIT_S:
                raise self._expired() from error
            raise Unavailable(
                f"no worker came back within {WORKER_WAIT_S:g} s: {decision.reason}"
            ) from error
        return decision.chosen

    def _choose(self, prepared: Prepared, handover: bool) -> Decision:
        with self._spans.route() as span:
            query = prepared.query(self._output, handover, self._excluded)
            now = self._parts.clock()
            decision = self._parts.core.choose(query, now)
            if decision.chosen is not None:
                self._parts.core.expect(query, decision.chosen, now)
            self._spans.decided(span, decision)
        self._parts.metrics.decided(decision)
        return decision

    def _start(self, prepared: Prepared, chosen: Candidate) -> None:
        self._decode_worker = chosen.decode_worker
        uncached = chosen.prompt.uncached
        if chosen.prefill_worker:
            self._usage.prefill_worker = chosen.prefill_worker
            self._send(prepared, chosen.prefill_worker, True, uncached=uncached)
        else:
            self._send(prepared, chosen.decode_worker, uncached=uncached)

    def _send(
        self,
        prepared: Prepared,
        worker: str,
        prefill_only: bool = False,
        tail_address: str = "",
        uncached: int = 0,
    ) -> None:
        submit = worker_pb2.Submit(
            request_id=prepared.wire_id,
            token_ids=prepared.prompt,
            num_prompt_tokens=len(prepared.prompt),
            sampling=prepared.sampling,
            cache_salt=prepared.salt,
            prefill_only=prefill_only,
            tail_address=tail_address,
            trace=self._spans.context,
            deadline_ms=max(1, round(self._left_s() * 1000)),
            shard_addresses=self._parts.fleet.shard_addresses(),
        )
        submit.token_ids.extend(self._output)
        if not prefill_only:
            self._usage.decode_worker = worker
        link = self._parts.fleet.workers[worker]
        self._bill.arrive(link.member)
        if link.member.simulated:
            self._simulate(submit)
        self._leg = Leg(self, link, self._parts.core.workers, prefill_only)
        self._leg.begin(submit, uncached)

    def _simulate(self, submit: worker_pb2.Submit) -> None:
        """Tells a simulated device when it begins by its own clock, and where its KV is from."""
        submit.simulated.CopyFrom(self._spans.simulated(self._bill.simulated_s))
        stays = self._bill.stays
        came_from = self._parts.fleet.workers.get(stays[-2].worker) if len(stays) > 1 else None
        if came_from is not None:
            submit.source.base_s = came_from.member.transfer_base_s
            submit.source.byte_s = came_from.member.transfer_byte_s

    def _first_of(self, leg: Leg, update: worker_pb2.TokenUpdate) -> None:
        """The first token of a leg; of the first leg, the caller's first token."""
        leg.first_token()
        self._spans.first_token()
        if not self._output:
            self._usage.ttft_s = self._parts.clock() - self._arrived
            self._usage.simulated_ttft_s = self._bill.simulated_s
            self._usage.cached_tokens = update.cached_tokens

    def _end(self, error: str) -> RequestEnd:
        return RequestEnd(
            operation="chat" if self._request.HasField("chat") else "text_completion",
            model=self._model,
            usage=self._usage,
            duration_s=self._parts.clock() - self._arrived,
            error=error,
        )

    def _used(self) -> int:
        """Tokens that the tenant pays for: none if nothing came of them."""
        return self._usage.prompt_tokens + len(self._output) if self._output else 0

    def _left_s(self) -> float:
        return max(0.001, self._deadline - self._parts.clock())

    def _release(self) -> None:
        """Every worker and tokenizer that still works for this request hears that it is over."""
        if self._leg is not None:
            self._leg.release()
            self._leg = None
        if self._speech is not None:
            self._parts.fleet.tokenizers.release(self._speech)
