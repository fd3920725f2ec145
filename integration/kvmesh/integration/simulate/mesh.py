"""Requests in the simulated mesh: where each one goes, and what it sees.

The decisions are the live router core's and schedulers'; what services/router/generation.py does
around them over RPC, this does in virtual time.
"""

from collections import deque

from kvmesh.integration.simulate.arrivals import Load, SimRequest
from kvmesh.integration.simulate.clock import VirtualClock
from kvmesh.integration.simulate.fleet import SimFleet
from kvmesh.integration.simulate.journey import Journey
from kvmesh.integration.simulate.lane import Run
from kvmesh.integration.simulate.policies import policy_of
from kvmesh.integration.simulate.record import Emitted, Gaps, RequestRecord
from kvmesh.integration.simulate.scenario import Failure, Scenario
from kvmesh.integration.simulate.transfer import Transfers
from kvmesh.integration.simulate.worker import SimWorker
from kvmesh.services.common.errors import MeshError, Unavailable
from kvmesh.services.router.admission import Admission
from kvmesh.services.router.core import Decision
from kvmesh.services.worker.sequence import Finish, Update

_UNBOUNDED = 1 << 30
MAX_MIGRATIONS = 3
WORKER_WAIT_S = 30.0  # for a worker to come back, when a request has lost its last one


class SimMesh:
    """One run of a load. `run` is called once."""

    def __init__(self, scenario: Scenario, load: Load, seed: int) -> None:
        self.clock = VirtualClock()
        self.fleet = SimFleet(scenario, self.clock, seed, self._ran)
        self.records: list[RequestRecord] = []
        self.gaps = Gaps()
        self.emitted = Emitted()
        self.migrations = 0
        self._scenario = scenario
        self._load = load
        self._policy = policy_of(scenario.options.policy, scenario.handover_min_tokens, seed)
        self._admission = Admission(scenario.max_active or _UNBOUNDED, float("inf"))
        self._transfers = Transfers(scenario, self.clock)
        self._journeys: dict[int, Journey] = {}
        self._stranded: list[Journey] = []  # no worker is there for them
        self._next = deque(load.requests)

    def run(self) -> None:
        for failure in self._scenario.failures:
            self.fleet.check(failure)
            self.clock.at(failure.at_s, lambda failure=failure: self._fail(failure))  # type: ignore[misc]
        if self._load.loop is None:
            self._next_arrival()
        else:
            for _ in range(min(self._load.loop.concurrency, len(self._next))):
                self.clock.at(0.0, self._loop_arrival)
        self.clock.run()

    def _next_arrival(self) -> None:
        """Open loop: sets the next request's arrival."""
        if self._next:
            request = self._next.popleft()
            self.clock.at(request.arrival_s, lambda: self._arrive_and_go_on(request))

    def _arrive_and_go_on(self, request: SimRequest) -> None:
        self._next_arrival()
        self._arrive(request)

    def _loop_arrival(self) -> None:
        if self._next:
            self._arrive(self._next.popleft())

    def _arrive(self, request: SimRequest) -> None:
        journey = Journey(request, RequestRecord(request, self.clock.now))
        self.records.append(journey.record)
        try:
            self._admission.enter(journey.name, self.clock.now)
            decision = self._choose(journey, handover=True)
            if decision.chosen is None:
                raise Unavailable(decision.reason)
        except MeshError as error:
            self._end(journey, error)
            return
        journey.start(decision.chosen)
        prefill = decision.chosen.prefill_worker
        uncached = decision.chosen.prompt.uncached
        self._send(journey, prefill or journey.decode_worker, bool(prefill), uncached)

    def _choose(self, journey: Journey, handover: bool) -> Decision:
        core, now = self.fleet.core, self.clock.now
        query = journey.query(handover)
        decision = self._policy.choose(core, query, now)
        if decision.chosen is not None:
            core.expect(query, decision.chosen, now)
        return decision

    def _send(self, journey: Journey, worker: str, prefill_only: bool, uncached: int) -> None:
        """The router counts it at once; it comes to the worker after the overhead."""
        journey.worker, journey.prefill_only = worker, prefill_only
        self._journeys[journey.request.index] = journey
        self.fleet.core.workers.sent(worker, journey.name, uncached)
        delay = self._scenario.overheads.request_s
        if delay:
            self.clock.at(self.clock.now + delay, lambda: self._submit(journey, worker))
        else:
            self._submit(journey, worker)

    def _submit(self, journey: Journey, name: str, tail_address: str = "") -> None:
        worker = self.fleet.workers.get(name)
        if journey.worker != name:
            return  # it went elsewhere meanwhile
        if worker is None:
            self._lost(journey)
            return
        if journey.record.sent_s is None:
            journey.record.sent_s = self.clock.now
        try:
            worker.submit(journey.work(journey.prefill_only, tail_address))
        except MeshError as error:
            self.fleet.core.workers.ended(name, journey.name)
            self._end(journey, error)
            return
        self.fleet.submitted(worker)

    def _ran(self, worker: SimWorker, run: Run, updates: list[Update]) -> None:
        tokens = steady = 0
        at = self.clock.now + self._scenario.overheads.token_s
        first_end = run.end(1) + self._scenario.overheads.token_s
        # Within a run steps grow, if at all: its last one is the longest.
        longest_s = run.end(run.steps) - run.end(run.steps - 1) if run.steps > 1 else 0.0
        for update in updates:
            journey = self._journeys.get(update.sequence.work.ticket)
            if journey is None or journey.worker != worker.name:
                continue
            tokens += len(update.tokens)
            got = self._told(journey, worker.name, update, first_end, at)
            steady += got
            if got and longest_s > journey.record.longest_gap_s:
                journey.record.longest_gap_s = longest_s
        if run.steps > 1 and steady:
            self.gaps.add_run(run.first_s + run.rise_s, run.rise_s, run.steps - 1, steady)
        if tokens:
            self.emitted.add(run.start, self.clock.now, tokens)

    def _told(
        self, journey: Journey, worker: str, update: Update, first_end: float, at: float
    ) -> bool:
        """Takes a request's part of a run; whether it got tokens in each of its steps."""
        record = journey.record
        steady = False
        if update.tokens:
            if record.last_token_s is None:
                first_s = self._scenario.overheads.first_token_s
                record.first_token_s = at if first_s is None else self.clock.now + first_s
                record.cached_tokens = update.sequence.cached_tokens
                timeline = update.sequence.timeline
                record.admitted_s, record.first_step_s = timeline.admitted, timeline.first_step
            else:
                gap = first_end - record.last_token_s
                self.gaps.single.append(gap)
                record.longest_gap_s = max(record.longest_gap_s, gap)
                steady = True
            record.last_token_s = max(at, record.first_token_s or at)
            record.output_tokens += len(update.tokens)
            journey.tokens += len(update.tokens)
            if update.first:
                self.fleet.core.workers.first_token(worker, journey.name)
        if update.finish is not None:
            self._leg_ended(journey, worker, update)
        return steady

    def _leg_ended(self, journey: Journey, worker: str, update: Update) -> None:
        self.fleet.core.workers.ended(worker, journey.name)
        journey.worker = ""
        if update.finish is Finish.HANDOVER:
            self._hand_over(journey, worker)
        else:
            self._end(journey, update.error)

    def _hand_over(self, journey: Journey, source: str) -> None:
        target = self.fleet.workers.get(journey.decode_worker)
        if target is None or target.name in journey.excluded:
            self._go_on(journey)
            return
        journey.worker, journey.prefill_only = target.name, False
        self.fleet.core.workers.sent(target.name, journey.name, 0)
        self._submit(journey, target.name, tail_address=source)
        ticket = journey.request.index
        if journey.worker == target.name:
            fetched = journey.handed_over(target.missing(ticket))
            ends = (self.fleet.workers.get(source), target)
            journey.record.transfer = self._transfers.start(ends, ticket, fetched)

    def _lost(self, journey: Journey) -> None:
        """Its worker is gone; it goes on elsewhere from what was said."""
        journey.worker = ""
        if journey.record.migrations >= MAX_MIGRATIONS:
            limit = f"after {MAX_MIGRATIONS} migrations (max_migrations)"
            self._end(journey, Unavailable(f"a worker went away, {limit}"))
            return
        journey.record.migrations += 1
        self.migrations += 1
        self._go_on(journey)

    def _go_on(self, journey: Journey) -> None:
        decision = self._choose(journey, handover=False)
        if decision.chosen is None:
            self._stranded.append(journey)
            self.clock.at(self.clock.now + WORKER_WAIT_S, lambda: self._give_up(journey))
            return
        chosen = decision.chosen
        journey.decode_worker = journey.record.decode_worker = chosen.decode_worker
        self._send(journey, chosen.decode_worker, False, chosen.prompt.uncached)

    def _give_up(self, journey: Journey) -> None:
        if journey in self._stranded:
            self._stranded.remove(journey)
            self._end(journey, Unavailable(f"no worker came back within {WORKER_WAIT_S:g} s"))

    def _fail(self, failure: Failure) -> None:
        worker = self.fleet.workers.get(failure.worker)
        if worker is None:
            return
        lost = self.fleet.fail(failure.worker)
        if failure.back_s is not None:
            again = worker.life.incarnation + 1
            self.clock.at(self.clock.now + failure.back_s, lambda: self._back(failure, again))
        for ticket in lost:
            self._lost(self._journeys[ticket])

    def _back(self, failure: Failure, incarnation: int) -> None:
        self.fleet.join(failure.worker, incarnation)
        waiting, self._stranded = self._stranded, []
        for journey in waiting:
            self._go_on(journey)

    def _end(self, journey: Journey, error: MeshError | None) -> None:
        journey.worker = ""
        record = journey.record
        record.end_s = self.clock.now if error else record.last_token_s
        record.error = f"{type(error).__name__}: {error}" if error else ""
        self._journeys.pop(journey.request.index, None)
        self._admission.leave(journey.name, self.clock.now, error is None)
        if self._load.loop is not None:
            self.clock.at(record.end_s or self.clock.now, self._loop_arrival)
