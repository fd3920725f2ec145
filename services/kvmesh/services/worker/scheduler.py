"""Continuous batching: who runs in the next step, with which tokens, in which blocks. Pure.

Each step takes every decoding sequence with one token, then prompt chunks within the token
budget. When blocks run out, the youngest running sequence gives its own back and waits at the
front of the queue; what it had said stands, and it goes on from there with the same tokens.
"""

from collections import deque
from collections.abc import Sequence as Listed

from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.errors import Expired, MeshError, Overloaded
from kvmesh.services.worker.adoption import Adoption, PoolPort
from kvmesh.services.worker.exports import Exports
from kvmesh.services.worker.holdings import Holdings
from kvmesh.services.worker.limits import Counters, Limits, Planned
from kvmesh.services.worker.sampler import Logprob, Sampled
from kvmesh.services.worker.sequence import Fetched, Finish, Sequence, State, Update, Work


class Scheduler:
    """All sequences of a worker. Not thread-safe; `now` is seconds on one monotonic clock."""

    def __init__(self, limits: Limits, pool: PoolPort) -> None:
        self.limits = limits
        self._holdings = Holdings(limits)
        self.cache = self._holdings.cache
        self.counters = Counters()
        self._pool = pool
        self._active: dict[Sequence, None] = {}  # all that have not ended
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self._exports = Exports(self._holdings)
        self._adoptions: dict[Sequence, Adoption] = {}
        self._updates: list[Update] = []
        self._arrivals = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._active) - len(self._running)

    @property
    def pending_prefill_tokens(self) -> int:
        return sum(s.remaining for s in self._active if s.remaining > 1)

    @property
    def has_work(self) -> bool:
        """Whether a step could do something now; fetching sequences wait for others."""
        return bool(self._running or self._waiting or self._exports.leaving or self._updates)

    @property
    def active(self) -> tuple[Sequence, ...]:
        return tuple(self._active)

    def next_deadline(self) -> float | None:
        """When `plan` has something to expire."""
        return min(
            (s.work.deadline for s in self._active if s.work.deadline is not None), default=None
        )

    def submit(self, work: Work, now: float) -> Sequence:
        """A new sequence: WAITING, or FETCHING if `fetched` is to be called for it.

        Raises InvalidRequest if it can never run, Overloaded if the queue is full.
        """
        self.limits.check(work)
        if self.num_waiting >= self.limits.max_waiting:
            raise Overloaded(
                f"{self.num_waiting} requests wait here, at most {self.limits.max_waiting} may"
            )
        capacity = self.limits.max_tokens
        if work.settings.max_tokens is not None:
            capacity = min(capacity, work.num_prompt + work.settings.max_tokens)
        self._arrivals += 1
        sequence = Sequence(self._arrivals, work, capacity, now)
        self._active[sequence] = None
        if work.tail_address or (work.shards and self.missing(sequence)):
            sequence.state = State.FETCHING
        else:
            self._waiting.append(sequence)
        return sequence

    def missing(self, sequence: Sequence) -> range:
        """Indices of the full blocks that are not here and could be fetched."""
        keys = sequence.usable_keys
        return range(len(self.cache.match(keys)), len(keys))

    def fetched(self, sequence: Sequence, fetched: Fetched) -> None:
        """What came for a FETCHING sequence, be it nothing; ignored once it has ended."""
        if sequence.state is State.FETCHING:
            sequence.fetched = fetched
            sequence.state = State.WAITING
            self._waiting.append(sequence)

    def cancel(self, sequence: Sequence, now: float) -> None:
        """Ends it as CANCELLED and frees all it holds. Once it has ended: no effect."""
        self._abort(sequence, Finish.CANCELLED, None, now)

    def fail(self, sequence: Sequence, error: MeshError, now: float) -> None:
        """Ends it as ERROR and frees all it holds. Once it has ended: no effect."""
        self._abort(sequence, Finish.ERROR, error, now)

    def plan(self, now: float, prefill: bool = True) -> list[Planned]:
        """The next step; empty if there is nothing to compute. Without `prefill` prompts wait."""
        self._expire(now)
        self._admit(now)
        self._adopt()
        ready = [s for s in self._running if s not in self._adoptions]
        planned = []
        for sequence in ready:
            decodes = sequence.state is State.RUNNING and sequence.remaining == 1
            if decodes and self._has_room(sequence):
                planned.append(Planned(sequence, sequence.computed, 1, True))
        if prefill:
            planned += self._plan_prefill(ready, len(planned))
        for step in planned:
            if step.sequence.timeline.first_step is None:
                step.sequence.timeline.first_step = now
        return planned

    def apply(
        self,
        plan: list[Planned],
        sampled: list[Sampled | None],
        now: float,
        block_seal_s: float = 0.0,
    ) -> None:
        """Takes the results of a step; `sampled` has one entry per planned `want_logits`.

        block_seal_s: device seconds that sealing each block that filled took.
        """
        self.counters.steps += bool(plan)
        self.counters.batch = len(plan)
        self.counters.batched += len(plan)
        results = iter(sampled)
        for step in plan:
            sequence = step.sequence
            sequence.computed += step.count
            sequence.steps += 1
            if step.count > 1 or not sequence.generated:
                self.counters.tokens_prefilled += step.count
            self._holdings.seal(sequence, step.start // BLOCK_SIZE, block_seal_s)
            if step.want_logits:
                self._take(sequence, next(results), now)

    def repeats(self, plan: list[Planned], most: int, width: int = 1) -> int:
        """How often, up to `most`, this plan will be the next step, its sequences further on.

        1 unless all of it decodes. Until then no sequence ends but in the last of these steps, none
        is pre-empted and none that waits finds room, if nothing is submitted meanwhile. width: most
        tokens of a sequence per step.
        """
        if self._adoptions or self._exports.leaving:
            return 1
        for step in plan:
            if step.count > 1 or not step.want_logits:
                return 1
            most = min(most, step.sequence.tokens_left)
        # At most one block more than its tokens fill, for each: mostly there is room for that.
        if len(plan) * (_blocks(most * width) + 1) > self.cache.available:
            while most > 1 and _lacking(plan, most * width) > self.cache.available:
                most //= 2
        # Who was pre-empted for this plan may fit again at once.
        return most if most > 1 and self._room_for_next() is None else 1

    def advance(
        self, plan: list[Planned], tokens: Listed[Listed[int]], now: float, steps: int = 1
    ) -> None:
        """Takes the results of `steps` equal decode steps at once: each sequence's tokens.

        The same as planning and applying them one by one, but for which of two sequences that say
        the same has the block that others find; of speculation, all accepted tokens.
        """
        self.counters.steps += steps
        self.counters.batch = len(plan)
        self.counters.batched += len(plan) * steps
        for step, said in zip(plan, tokens, strict=True):
            lacking = _blocks(step.start + len(said)) - len(step.sequence.blocks)
            if lacking > 0:
                step.sequence.hold(self.cache.allocate(lacking))
        for step, said in zip(plan, tokens, strict=True):
            sequence = step.sequence
            self.counters.tokens_prefilled += not sequence.generated
            sequence.computed += len(said)
            sequence.steps += steps
            finish = self._say(sequence, said, (), now)
            self._holdings.seal(sequence, step.start // BLOCK_SIZE, 0.0)
            if finish is not None:
                self._finished(sequence, finish, now)

    def drain_updates(self) -> list[Update]:
        """What the sequences' owners must be told, in order."""
        updates, self._updates = self._updates, []
        return updates

    def exports(self, budget: int) -> list[tuple[Sequence, int]]:
        """Up to `budget` (sequence, block index) that shards do not have; all of a hand-over.

        The caller exports them before the next `plan`, then calls `settle`.
        """
        return self._exports.choose(self._running, budget)

    def handovers(self) -> list[Sequence]:
        """Ended prefills whose tail is still in its slot; after `settle` it no longer is."""
        return self._exports.handovers

    def settle(self, force: bool = False) -> None:
        """Frees what ended sequences held for exports that are done, or with `force` given up."""
        self._exports.settle(force)

    def corrupt(self, block: int) -> None:
        """A sealed block does not verify: nobody may attend to it any more."""
        self.counters.checksum_failures += 1
        self.cache.forget(block)
        for sequence in [s for s in self._running if block in s.blocks]:
            self._preempt(sequence)
        for sequence in [s for s in self._exports.leaving if block in s.blocks]:
            self._exports.give_up(sequence)

    def check_integrity(self) -> None:
        """Raises AssertionError naming what does not fit together."""
        self._holdings.check_integrity((*self._running, *self._exports.leaving))

    def _expire(self, now: float) -> None:
        for sequence in list(self._active):
            deadline = sequence.work.deadline
            if deadline is not None and now >= deadline:
                late = Expired(f"{sequence.work.request_id} ran past its deadline")
                self.fail(sequence, late, now)

    def _admit(self, now: float) -> None:
        while (local := self._room_for_next()) is not None:
            sequence = self._waiting.popleft()
            self._holdings.give(sequence, local)
            sequence.state = State.RUNNING
            self._running.append(sequence)
            self._running.sort(key=lambda s: s.order)
            self._adoptions[sequence] = Adoption(len(local), sequence.fetched)
            if sequence.timeline.admitted is None:
                sequence.timeline.admitted = now

    def _room_for_next(self) -> list[int] | None:
        """The cached blocks that the next one to admit would share; None if it cannot run now."""
        return self._holdings.room_for(self._waiting[0]) if self._waiting else None

    def _adopt(self) -> None:
        budget = self.limits.adopt_blocks
        for sequence, adoption in list(self._adoptions.items()):
            if sequence not in self._adoptions:  # pre-empted for a corrupt block meanwhile
                continue
            if budget <= 0:
                return
            wanted = budget
            budget -= adoption.advance(sequence, self.cache, self._pool, wanted)
            if adoption.corrupt is not None:
                self.corrupt(adoption.corrupt)
            elif budget > 0:
                self._adopted(sequence, adoption)

    def _adopted(self, sequence: Sequence, adoption: Adoption) -> None:
        del self._adoptions[sequence]
        self.counters.checksum_failures += adoption.rejected
        sequence.fetched = None
        if sequence.timeline.first_step is None:
            sequence.cached_tokens = min(sequence.computed, sequence.work.num_prompt)
            if sequence.work.is_new:
                self.counters.prefix_tokens += sequence.work.num_prompt
                self.counters.prefix_hits += sequence.cached_tokens

    def _plan_prefill(self, ready: list[Sequence], num_decodes: int) -> list[Planned]:
        budget = self.limits.step_tokens - num_decodes
        if num_decodes:
            budget = min(budget, self.limits.prefill_chunk)
        planned = []
        for sequence in ready:
            if budget > 0 and sequence.state is State.RUNNING and sequence.remaining > 1:
                count = min(sequence.remaining, budget)
                budget -= count
                whole = count == sequence.remaining
                planned.append(Planned(sequence, sequence.computed, count, whole))
        return planned

    def _has_room(self, sequence: Sequence) -> bool:
        """Makes room for its next token; False if that cost the sequence its own place."""
        if sequence.computed < len(sequence.blocks) * BLOCK_SIZE:
            return True
        while not self.cache.can_allocate(1):
            if self._exports.give_up_one():
                continue
            youngest = self._running[-1]
            self.counters.preemptions += 1
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.hold(self.cache.allocate(1))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._adoptions.pop(sequence, None)
        self._holdings.free(sequence)
        sequence.computed = 0
        sequence.state = State.WAITING
        self._waiting.appendleft(sequence)

    def _take(self, sequence: Sequence, sampled: Sampled | None, now: float) -> None:
        if sampled is None:
            self.fail(sequence, sequence.no_choice(), now)
            return
        logprobs = (sampled.logprob,) if sampled.logprob is not None else ()
        finish = self._say(sequence, (sampled.token,), logprobs, now)
        if finish is not None:
            self._finished(sequence, finish, now)

    def _say(
        self, sequence: Sequence, tokens: Listed[int], logprobs: tuple[Logprob, ...], now: float
    ) -> Finish | None:
        first = sequence.generated == 0
        finish = sequence.extend(tokens)
        self.counters.tokens_generated += len(tokens)
        if first:
            sequence.timeline.first_token = now
        sequence.timeline.mark(now, sequence.generated)
        self._updates.append(Update(sequence, tuple(tokens), logprobs, first, finish))
        return finish

    def _finished(self, sequence: Sequence, finish: Finish, now: float) -> None:
        self._running.remove(sequence)
        del self._active[sequence]
        sequence.end(finish, now)
        self._exports.leave(sequence)

    def _abort(
        self, sequence: Sequence, finish: Finish, error: MeshError | None, now: float
    ) -> None:
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._adoptions.pop(sequence, None)
            self._holdings.free(sequence)
        elif sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        del self._active[sequence]
        sequence.end(finish, now)
        self._updates.append(Update(sequence, finish=finish, error=error))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def _lacking(plan: list[Planned], steps: int) -> int:
    """Blocks to allocate for so many decode steps of these sequences."""
    return sum(max(0, _blocks(p.start + steps) - len(p.sequence.blocks)) for p in plan)
