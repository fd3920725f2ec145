"""The loop that runs the model, in one thread of its own.

Only this thread touches model, pool and scheduler. Others post commands into its inbox; it posts
one Outcome per step to its sink. With nothing to do it waits on a condition.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from kvmesh.backends.base import DeviceInfo, Model, Segment
from kvmesh.kernels.errors import BlockError
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.errors import MeshError
from kvmesh.services.kvcache.client import SealedBlock
from kvmesh.services.worker.device_use import DeviceMeter, StepPart
from kvmesh.services.worker.limits import Limits, Planned
from kvmesh.services.worker.outcome import Exported, FetchWish, Load, Outcome
from kvmesh.services.worker.pace import Pace
from kvmesh.services.worker.sampler import sample
from kvmesh.services.worker.scheduler import Scheduler
from kvmesh.services.worker.sequence import Fetched, Sequence, State, Tail, Work
from kvmesh.services.worker.timeline import TransferTime
from kvmesh.services.worker.verified_pool import VerifiedPool
from kvmesh.services.worker.virtual import VirtualClock

logger = logging.getLogger(__name__)

EXPORT_BLOCKS = 16  # copied out per step; more would hold up those that decode
ESTIMATE_EVERY_S = 0.5


class Engine:
    """Runs sequences on a model. All methods may be called from any thread.

    sink: gets each Outcome, in the engine's thread. clock: seconds, monotonic.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        sink: Callable[[Outcome], None],
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._sink = sink
        self._clock = clock
        self._scheduler = Scheduler(limits, VerifiedPool(model.pool))
        self._sequences: dict[int, Sequence] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._refusals: list[tuple[int, MeshError]] = []
        self._wishes: list[FetchWish] = []
        self._estimate = self._told = model.estimate()
        self._estimate_at = clock()
        # A simulated device's clock does not run while this loop works.
        self._pace = None if model.device.simulated else Pace(self._estimate, clock())
        self._meter = DeviceMeter(model.device.simulated, clock())
        self._virtual = _virtual_clock(model.device)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step; twice is safe. Running sequences get no word."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, work: Work) -> None:
        """Updates with this work follow; or one refusal of its ticket."""
        self._post(partial(self._submit, work))

    def cancel(self, ticket: int) -> None:
        """An unknown ticket, or one that has ended, is no error."""
        self._post(partial(self._cancel, ticket))

    def fetched(self, ticket: int, fetched: Fetched) -> None:
        """Answers a FetchWish."""
        self._post(partial(self._fetched, ticket, fetched))

    def unshare(self, keys: tuple[bytes, ...]) -> None:
        """The shards did not take the exported blocks with these keys."""
        self._post(partial(self._scheduler.cache.unshare, keys))

    def inspect(self, look: Callable[[Scheduler], None]) -> None:
        """Calls `look` between two steps, in the engine's thread."""
        self._post(partial(look, self._scheduler))

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _run(self) -> None:
        while self._wait():
            try:
                while self._inbox:
                    self._inbox.popleft()()
                plan = self._scheduler.plan(self._clock())
                if plan:
                    self._step(plan)
                self._report(stepped=bool(plan))
                self._export()
                if plan and self._pace is not None:
                    self._pace.stepped(plan, self._clock())
            except Exception:
                logger.exception("unexpected error in the engine; all its requests end")
                self._fail(list(self._scheduler.active))
                self._give_up_exports()

    def _wait(self) -> bool:
        """Waits for something to do; False when stopped."""
        with self._wake:
            while not (self._inbox or self._stopped or self._scheduler.has_work):
                deadline = self._scheduler.next_deadline()
                left = None if deadline is None else deadline - self._clock()
                if left is not None and left <= 0:
                    break
                self._wake.wait(left)
                if self._pace is not None:
                    self._pace.woke(self._clock())
            return not self._stopped

    def _step(self, plan: list[Planned]) -> None:
        segments = [
            Segment(
                slot=step.sequence.held_slot,
                start=step.start,
                token_ids=step.sequence.slice(step.start, step.start + step.count),
                block_table=step.sequence.block_table,
                want_logits=step.want_logits,
            )
            for step in plan
        ]
        self._meter.begin(self._scheduler.active, self._clock())
        try:
            logits = self._model.forward(segments)
            self._charge(plan)
            sampled = sample(logits, [s.sequence.choice() for s in plan if s.want_logits])
        except Exception:
            logger.exception("a step of %d sequences failed", len(plan))
            self._meter.failed(self._clock())
            self._fail([step.sequence for step in plan])
            return
        times = self._model.last_step
        block_seal_s = times.seal_s / max(times.sealed_blocks, 1)
        self._scheduler.apply(plan, sampled, self._clock(), block_seal_s)

    def _charge(self, plan: list[Planned]) -> None:
        """Shares the step's device time out, before its results are taken."""
        times = self._model.last_step
        parts = [(step.sequence, _part(step)) for step in plan]
        self._meter.end(parts, times, self._estimate, self._clock())
        if self._virtual is not None and times.simulated_s is not None:
            self._virtual.step(plan, times.simulated_s)

    def _fail(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._scheduler.fail(sequence, MeshError("internal error"), self._clock())

    def _report(self, stepped: bool) -> None:
        outcome = self._outcome()
        outcome.updates = self._scheduler.drain_updates()
        for update in outcome.updates:
            if update.finish is not None:
                self._sequences.pop(update.sequence.work.ticket, None)
        outcome.refusals, self._refusals = self._refusals, []
        outcome.wishes, self._wishes = self._wishes, []
        news = outcome.updates or outcome.refusals or outcome.wishes
        if stepped or news or outcome.events.stored or outcome.events.removed:
            self._sink(outcome)

    def _export(self) -> None:
        chosen = self._scheduler.exports(EXPORT_BLOCKS)
        handovers = self._scheduler.handovers()
        if chosen or handovers:
            blocks: dict[Sequence, list[SealedBlock]] = {s: [] for s in handovers}
            tails = {s: self._export_tail(s) for s in handovers}
            for sequence, index in chosen:
                self._export_block(sequence, index, blocks.setdefault(sequence, []))
            self._scheduler.settle()
            outcome = self._outcome()
            outcome.exports = [
                Exported(s.work, tuple(b), s in tails, tails.get(s)) for s, b in blocks.items()
            ]
            self._sink(outcome)

    def _give_up_exports(self) -> None:
        handovers = self._scheduler.handovers()
        outcome = self._outcome()
        outcome.exports = [Exported(s.work, (), handover=True) for s in handovers]
        self._sink(outcome)
        self._scheduler.settle(force=True)

    def _export_block(self, sequence: Sequence, index: int, into: list[SealedBlock]) -> None:
        if index >= len(sequence.blocks):  # given up for a corrupt block just now
            return
        block = sequence.blocks[index]
        try:
            data = self._model.pool.export_block(block)
        except BlockError as error:
            logger.warning("a sealed block is not exported: %s", error)
            self._scheduler.corrupt(block)
            return
        into.append(SealedBlock(sequence.key(index), sequence.parent_key(index), index, data))

    def _export_tail(self, sequence: Sequence) -> Tail:
        start = sequence.computed // BLOCK_SIZE * BLOCK_SIZE
        num_tokens = sequence.computed - start
        data = self._model.pool.export_tail(sequence.held_slot, num_tokens)
        return Tail(start, num_tokens, data)

    def _submit(self, work: Work) -> None:
        try:
            sequence = self._scheduler.submit(work, self._clock())
        except MeshError as error:
            self._refusals.append((work.ticket, error))
            return
        self._sequences[work.ticket] = sequence
        if self._virtual is not None:
            self._virtual.arrive(sequence)
        if sequence.state is State.FETCHING:
            missing = self._scheduler.missing(sequence) if work.shards else range(0)
            keys = tuple(sequence.key(index) for index in missing)
            self._wishes.append(FetchWish(work, missing.start, keys))

    def _cancel(self, ticket: int) -> None:
        sequence = self._sequences.get(ticket)
        if sequence is not None:
            self._scheduler.cancel(sequence, self._clock())

    def _fetched(self, ticket: int, fetched: Fetched) -> None:
        sequence = self._sequences.get(ticket)
        if sequence is not None:
            if self._virtual is not None:
                self._virtual.arrive(sequence, fetched.num_bytes)
            self._scheduler.fetched(sequence, fetched)

    def idle_load(self) -> Load:
        """The load of an engine that has not been started yet."""
        return self._load()

    def _outcome(self) -> Outcome:
        return Outcome(self._load(), self._scheduler.cache.drain_events())

    def _load(self) -> Load:
        now = self._clock()
        if now - self._estimate_at >= ESTIMATE_EVERY_S:
            self._estimate, self._estimate_at = self._model.estimate(), now
            self._told = self._estimate if self._pace is None else self._pace.estimate()
        scheduler = self._scheduler
        return Load(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pending_prefill_tokens=scheduler.pending_prefill_tokens,
            blocks_total=scheduler.cache.num_blocks,
            blocks_free=scheduler.cache.available,
            estimate=self._told,
            counters=scheduler.counters.copy(),
        )


def _virtual_clock(device: DeviceInfo) -> VirtualClock | None:
    if not device.simulated:
        return None
    return VirtualClock(TransferTime(device.transfer_base_s, device.transfer_byte_s))


def _part(step: Planned) -> StepPart:
    filled = (step.start + step.count) // BLOCK_SIZE - step.start // BLOCK_SIZE
    return StepPart(step.start, step.count, not step.sequence.generated, filled)
