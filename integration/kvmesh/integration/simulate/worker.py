"""A worker in virtual time: its lanes, which of its ranks takes a request, and what it reports."""

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

import numpy as np

from kvmesh.integration.simulate.clock import Alarm, VirtualClock
from kvmesh.integration.simulate.deploy import Deployed
from kvmesh.integration.simulate.drafts import Drafts
from kvmesh.integration.simulate.lane import Lane, Run
from kvmesh.integration.simulate.scenario import Optimisations
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.worker.blocks import CacheEvents
from kvmesh.services.worker.scheduler import Scheduler
from kvmesh.services.worker.sequence import Fetched, Sequence, State, Update, Work
from kvmesh.v1 import worker_pb2


@dataclass(slots=True)
class Rank:
    """One scheduler of a worker, and what it has taken on: prompt tokens to compute, tokens of its
    sequences."""

    lane: int
    scheduler: Scheduler
    pending: int = 0
    context: int = 0


@dataclass(slots=True)
class Place:
    """Where in a worker a request is, and what it counts for there."""

    rank: Rank
    sequence: Sequence
    pending: int


@dataclass(slots=True)
class _LaneState:
    alarm: Alarm | None = None  # the end of its run
    woken: bool = False


@dataclass(frozen=True, slots=True)
class Life:
    """What a worker is made from. on_run: called when a run's results have been taken."""

    name: str
    incarnation: int
    deployed: Deployed
    options: Optimisations
    rng: np.random.Generator
    on_run: Callable[["SimWorker", Run, list[Update]], None] = field(compare=False)


@dataclass(frozen=True, slots=True)
class KeyEvents:
    """What kvmesh.v1.BlockEvents says, without making each key anew."""

    incarnation: int
    sequence: int
    stored: Listed[bytes]
    removed: Listed[bytes]
    snapshot: bool = False


class SimWorker:
    """One life of a worker: one instance of the model."""

    def __init__(self, life: Life, clock: VirtualClock) -> None:
        deployed, options = life.deployed, life.options
        self.life = life
        self.busy_s = 0.0  # of its first stage
        self.sends_until = 0.0  # its link is taken until then
        self._clock = clock
        drafts = None
        if options.acceptance and deployed.pool.role != "prefill":
            drafts = Drafts(options.acceptance, life.rng)
        self._lanes = [Lane(deployed, drafts, options.balance) for _ in range(deployed.lanes)]
        self._states = [_LaneState() for _ in self._lanes]
        self._ranks = [Rank(i, s) for i, lane in enumerate(self._lanes) for s in lane.ranks]
        self._places: dict[int, Place] = {}
        self.alive = True
        self._turn = 0
        self._stage_free = 0.0
        self._events = 0
        self._held: Counter[bytes] = Counter()  # keys, by how many ranks hold them

    @property
    def name(self) -> str:
        return self.life.name

    @property
    def tickets(self) -> list[int]:
        """Of the requests that are here."""
        return list(self._places)

    @property
    def running(self) -> int:
        return sum(rank.scheduler.num_running for rank in self._ranks)

    @property
    def waiting(self) -> int:
        return sum(rank.scheduler.num_waiting for rank in self._ranks)

    @property
    def blocks_used(self) -> float:
        """Share of the blocks that sequences hold."""
        total = self.life.deployed.limits.num_blocks * len(self._ranks)
        return 1 - sum(rank.scheduler.cache.available for rank in self._ranks) / total

    def sequence(self, ticket: int) -> Sequence | None:
        place = self._places.get(ticket)
        return place.sequence if place is not None else None

    def submit(self, work: Work) -> Sequence:
        """Raises InvalidRequest if it can never run here."""
        rank = self._choose(work)
        sequence = rank.scheduler.submit(work, self._clock.now)
        place = Place(rank, sequence, self._pending(rank, work))
        self._places[work.ticket] = place
        rank.pending += place.pending
        rank.context += sequence.length
        if sequence.state is not State.FETCHING:
            self._wake(rank.lane)
        return sequence

    def missing(self, ticket: int) -> range:
        """Indices of the request's full blocks that are not here."""
        place = self._places[ticket]
        return place.rank.scheduler.missing(place.sequence)

    def fetched(self, ticket: int, fetched: Fetched) -> None:
        """What was handed over; ignored if the request is not here any more."""
        place = self._places.get(ticket)
        if place is not None:
            place.rank.scheduler.fetched(place.sequence, fetched)
            self._wake(place.rank.lane)

    def die(self) -> list[int]:
        """Nothing happens here any more; the requests that are lost."""
        for state in self._states:
            if state.alarm is not None:
                state.alarm.cancel()
        self.alive = False
        lost, self._places = list(self._places), {}
        return lost

    def report(self) -> worker_pb2.LoadReport:
        limits = self.life.deployed.limits
        pending = sum(r.scheduler.pending_prefill_tokens for r in self._ranks if r.pending)
        return worker_pb2.LoadReport(
            running=self.running,
            waiting=self.waiting,
            pending_prefill_tokens=pending,
            # A prompt must fit one rank, and the router asks how long one may be.
            blocks_total=limits.num_blocks,
            blocks_free=min(rank.scheduler.cache.available for rank in self._ranks),
        )

    def events(self) -> KeyEvents | None:
        """Keys that came and went since the last call; None if none did."""
        if len(self._ranks) == 1:
            change = self._ranks[0].scheduler.cache.drain_events()
            stored, removed = change.stored, change.removed
        else:
            came: list[bytes] = []
            went: list[bytes] = []
            for rank in self._ranks:
                self._merge(rank.scheduler.cache.drain_events(), came, went)
            stored, removed = tuple(came), tuple(went)
        if not stored and not removed:
            return None
        self._events += 1
        return KeyEvents(self.life.incarnation, self._events, stored, removed)

    def _merge(self, change: CacheEvents, stored: list[bytes], removed: list[bytes]) -> None:
        """A worker holds what any of its ranks holds."""
        for key in change.stored:
            self._held[key] += 1
            if self._held[key] == 1:
                stored.append(key)
        for key in change.removed:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                removed.append(key)

    def _choose(self, work: Work) -> Rank:
        if len(self._ranks) == 1:
            return self._ranks[0]
        if not self.life.options.balance:
            self._turn += 1
            return self._ranks[(self._turn - 1) % len(self._ranks)]
        return min(self._ranks, key=lambda r: (r.pending + self._pending(r, work), r.context))

    def _pending(self, rank: Rank, work: Work) -> int:
        """Prompt tokens that this rank would have to compute, to compare it with others."""
        if work.tail_address:
            return 0
        size = len(work.token_ids)
        if len(self._ranks) == 1:
            return size
        return max(1, size - len(rank.scheduler.cache.match(work.keys)) * BLOCK_SIZE)

    def _wake(self, lane: int) -> None:
        """Plans once all that happens at this moment has happened."""
        state, run = self._states[lane], self._lanes[lane].run
        if run is not None:
            if run.steps > 1 and state.alarm is not None:
                state.alarm.cancel()
                run.stop_at(self._clock.now)
                self._set_end(lane, run)
            return
        if not state.woken:
            state.woken = True
            self._clock.at(max(self._clock.now, self._stage_free), lambda: self._begin(lane))

    def _begin(self, lane: int) -> None:
        if not self.alive:
            return
        state, now = self._states[lane], self._clock.now
        if self._stage_free > now:  # another lane was first
            self._clock.at(self._stage_free, lambda: self._begin(lane))
            return
        state.woken = False
        if self._lanes[lane].run is None and self._lanes[lane].plan(now):
            run = self._lanes[lane].run
            assert run is not None
            if len(self._lanes) > 1:
                self._stage_free = now + run.occupied_s
            self._set_end(lane, run)

    def _set_end(self, lane: int, run: Run) -> None:
        end = run.end(run.steps)
        self._states[lane].alarm = self._clock.at(end, lambda: self._end(lane))

    def _end(self, lane: int) -> None:
        run = self._lanes[lane].commit(self._clock.now)
        self.busy_s += run.occupied_s if len(self._lanes) > 1 else run.end(run.steps) - run.start
        updates: list[Update] = []
        for rank in self._ranks:
            if rank.lane == lane:
                updates += self._taken(rank)
        self._states[lane].woken = False
        self._wake(lane)
        self.life.on_run(self, run, updates)

    def _taken(self, rank: Rank) -> list[Update]:
        updates = rank.scheduler.drain_updates()
        for update in updates:
            place = self._places.get(update.sequence.work.ticket)
            if place is None:
                continue
            rank.context += len(update.tokens)
            if update.first:
                rank.pending -= place.pending
                place.pending = 0
            if update.finish is not None:
                del self._places[update.sequence.work.ticket]
                rank.pending -= place.pending
                rank.context -= update.sequence.length
        return updates
