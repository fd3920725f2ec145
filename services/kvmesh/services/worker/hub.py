"""Between routers' streams and the engine, in the event loop's thread.

Knows each request from its Submit to its one last update, and who has to be told what.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from dataclasses import replace

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from kvmesh.backends.base import Model
from kvmesh.services.common import names
from kvmesh.services.common.errors import Expired, InvalidRequest, MeshError, Unavailable
from kvmesh.services.common.telemetry import Telemetry, context_of, extract, inject
from kvmesh.services.worker.constraint import GrammarMatcher, Grammars
from kvmesh.services.worker.engine import Engine
from kvmesh.services.worker.limits import Limits
from kvmesh.services.worker.messages import (
    Receipt,
    end_update,
    load_report,
    pairs_of,
    to_work,
    token_update,
)
from kvmesh.services.worker.outbox import Outbox
from kvmesh.services.worker.outcome import Exported, FetchWish, Load, Outcome
from kvmesh.services.worker.sequence import Fetched, Finish, Tail, Update, Work
from kvmesh.services.worker.session import Request, Session
from kvmesh.services.worker.spans import RequestSpans
from kvmesh.services.worker.tails import KeptTails
from kvmesh.services.worker.transfer import Transfer
from kvmesh.v1 import worker_pb2

logger = logging.getLogger(__name__)

COMPILE_S = 5.0  # for an output constraint; it takes milliseconds unless the machine is busy


class Hub:
    """All methods run in the event loop that `start` was called in. Owns the engine.

    grammars: compile output constraints; set before `start`, None if the model has no vocabulary.
    """

    def __init__(
        self, model: Model, limits: Limits, transfer: Transfer, telemetry: Telemetry,
        incarnation: int,
    ) -> None:  # fmt: skip
        self.grammars: Grammars | None = None
        self.spec = model.spec
        self.limits = limits
        self.engine = Engine(model, limits, self._from_engine, time.monotonic)
        self.draining = False
        self._tails = KeptTails()
        self._transfer = transfer
        self._telemetry = telemetry
        self._spans = RequestSpans(telemetry)
        self._incarnation = incarnation
        self._tickets = itertools.count(1)
        self._sessions: set[Session] = set()
        self._requests: dict[int, Request] = {}
        self._held: dict[bytes, None] = {}  # keys of the pool's known blocks
        self._load = self.engine.idle_load()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def open(self) -> Session:
        """A new stream; everything that happens from now on is in its outbox."""
        session = Session(Outbox(self._incarnation, list(self._held)))
        session.outbox.set_load(self.load_report())
        self._sessions.add(session)
        return session

    def close_session(self, session: Session) -> None:
        """Cancels all that still runs for it. Twice is safe."""
        self._sessions.discard(session)
        for request in list(session.requests.values()):
            self._cancel(request)

    def submit(self, session: Session, submit: worker_pb2.Submit) -> None:
        """Never raises: what is wrong with the request is its last update."""
        parent = extract(pairs_of(submit.trace))
        attributes = {names.REQUEST_ID: submit.request_id}
        span = self._telemetry.start(names.SPAN_WORKER, parent, attributes)
        receipt = Receipt(next(self._tickets), time.monotonic(), inject(context_of(span)))
        try:
            if self.draining:
                raise Unavailable("this worker drains; send the request elsewhere")
            if submit.request_id in session.requests:
                raise InvalidRequest(f"request {submit.request_id!r} is running already")
            work = to_work(submit, self.spec, receipt)
        except MeshError as error:
            _refused(span, error)
            session.outbox.add_update(end_update(submit.request_id, Finish.ERROR, error))
            return
        request = Request(receipt.ticket, submit.request_id, session, span)
        self._requests[request.ticket] = session.requests[request.request_id] = request
        self._idle.clear()
        if work.settings.constraint is None:
            self._to_engine(request, work)
        else:
            request.task = asyncio.create_task(self._constrain(request, work))

    def _to_engine(self, request: Request, work: Work) -> None:
        request.submitted = True
        self.engine.submit(work)

    async def _constrain(self, request: Request, work: Work) -> None:
        """Compiles the constraint away from the engine's steps, replays the output, submits."""
        try:
            async with asyncio.timeout(COMPILE_S):
                matcher = await asyncio.to_thread(self._matcher, work)
        except TimeoutError:
            late = Expired(f"the constraint was not compiled within {COMPILE_S:g} s")
            self._refuse(request, late)
        except MeshError as error:
            self._refuse(request, error)
        except Exception:
            logger.exception("compiling the constraint of %s failed", request.request_id)
            self._refuse(request, MeshError("internal error"))
        else:
            self._to_engine(request, replace(work, matcher=matcher))

    def _matcher(self, work: Work) -> GrammarMatcher:
        constraint = work.settings.constraint
        if self.grammars is None or constraint is None:
            raise InvalidRequest("this model's tokenizer gives no vocabulary for constraints")
        return self.grammars.open(constraint, work.token_ids[work.num_prompt :])

    def _refuse(self, request: Request, error: MeshError) -> None:
        """Ends a request that never ran."""
        self._end(request, end_update(request.request_id, Finish.ERROR, error))
        _refused(request.span, error)

    def cancel(self, session: Session, request_id: str) -> None:
        """Ends the request, or drops the tail that is kept of it. Unknown ids are no error."""
        request = session.requests.get(request_id)
        if request is not None:
            self._cancel(request)
        else:
            self._tails.drop(request_id)

    def take_tail(self, request_id: str) -> Tail | None:
        return self._tails.take(request_id, time.monotonic())

    @property
    def load(self) -> Load:
        """How busy the engine was at its last step."""
        return self._load

    def load_report(self) -> worker_pb2.LoadReport:
        return load_report(self._load, self.draining)

    async def drain(self) -> None:
        """Takes no new work; returns when the running work has ended and is stored."""
        self.draining = True
        await self._idle.wait()
        await self._transfer.settle()

    async def close(self) -> None:
        """Ends the engine and the streams. Twice is safe."""
        await asyncio.to_thread(self.engine.stop)
        for request in list(self._requests.values()):
            self._refuse(request, Unavailable("this worker has stopped"))
        for session in self._sessions:
            session.outbox.close()

    def _from_engine(self, outcome: Outcome) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._deliver, outcome)

    def _deliver(self, outcome: Outcome) -> None:
        self._load = outcome.load
        for key in outcome.events.removed:
            self._held.pop(key, None)
        self._held.update(dict.fromkeys(outcome.events.stored))
        report = self.load_report() if self._sessions else None
        for session in self._sessions:
            session.outbox.add_events(outcome.events)
            if report is not None:
                session.outbox.set_load(report)
        for update in outcome.updates:
            self._update(update)
        for ticket, error in outcome.refusals:
            self._refuse(self._requests[ticket], error)
        for wish in outcome.wishes:
            wanting = self._requests.get(wish.work.ticket)
            if wanting is not None:  # else it was cancelled before it could be fetched for
                wanting.task = asyncio.create_task(self._fetch(wanting, wish))
        for exported in outcome.exports:
            self._store(exported)

    def _update(self, update: Update) -> None:
        request = self._requests.get(update.sequence.work.ticket)
        if request is None:
            return
        message = token_update(update)
        if update.finish is None:
            request.session.outbox.add_update(message)
        elif update.finish is Finish.HANDOVER:
            request.session.outbox.add_update(message)
            request.prefilled = update.sequence
        else:
            self._end(request, message)
            self._spans.finish(request.span, update.sequence)

    def _store(self, exported: Exported) -> None:
        keys = tuple(block.key for block in exported.blocks)
        stored = self._transfer.put(exported, lambda: self.engine.unshare(keys))
        request = self._requests.get(exported.work.ticket)
        if exported.handover and request is not None:
            if exported.tail is not None:
                self._tails.keep(request.request_id, exported.tail, time.monotonic())
            request.task = asyncio.create_task(self._hand_over(request, stored))

    async def _hand_over(self, request: Request, stored: asyncio.Task[None] | None) -> None:
        """The next worker must find the blocks, so it is told only once they are stored."""
        if stored is not None:
            await asyncio.wait({stored})
        self._end_hand_over(request, Finish.HANDOVER)

    def _end_hand_over(self, request: Request, finish: Finish) -> None:
        self._end(request, end_update(request.request_id, finish))
        if request.prefilled is not None:
            self._spans.finish(request.span, request.prefilled)

    async def _fetch(self, request: Request, wish: FetchWish) -> None:
        fetched = Fetched()
        try:
            fetched = await self._transfer.fetch(wish)
        except Exception:
            logger.exception("fetching for %s failed; it is computed here", request.request_id)
        self.engine.fetched(request.ticket, fetched)

    def _cancel(self, request: Request) -> None:
        if not request.submitted:
            self._end(request, end_update(request.request_id, Finish.CANCELLED))
            request.span.end()
            return
        if request.prefilled is None:
            self.engine.cancel(request.ticket)  # its last update comes from there
            return
        self._tails.drop(request.request_id)
        if request.task is not None:
            request.task.cancel()
        self._end_hand_over(request, Finish.CANCELLED)

    def _end(self, request: Request, message: worker_pb2.TokenUpdate) -> None:
        """The one place where a request ends."""
        del self._requests[request.ticket]
        del request.session.requests[request.request_id]
        if request.task is not None and request.task is not asyncio.current_task():
            request.task.cancel()
        request.session.outbox.add_update(message)
        if not self._requests:
            self._idle.set()


def _refused(span: trace.Span, error: MeshError) -> None:
    span.set_status(Status(StatusCode.ERROR, str(error)))
    span.end()
