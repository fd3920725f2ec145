"""Batches of one worker: a live scheduler per attention rank, stepped together in virtual time.

Steps of the same decoding sequences are taken many at once; whoever comes meanwhile ends that run
after the step under way.
"""

from bisect import bisect_left
from collections.abc import Sequence as Listed
from dataclasses import dataclass

import numpy as np

from kvmesh.backends.cost.shapes import StepWork, attended_tokens, windowed_attended
from kvmesh.integration.simulate.deploy import Deployed
from kvmesh.integration.simulate.drafts import Counts, Drafts
from kvmesh.services.worker.limits import Planned
from kvmesh.services.worker.sampler import Sampled
from kvmesh.services.worker.scheduler import Scheduler
from kvmesh.services.worker.sequence import State

MOST_STEPS = 256  # of a run
LEAST_DRAWN = 8  # steps of a run with drafts
HOLD_STEPS = 9  # most steps that prompts wait for those of other ranks


class PerfectPool:
    """Blocks without bytes: all of them verify."""

    def verify(self, block: int) -> bool:
        return True

    def import_block(self, block: int, data: bytes) -> bool:
        return True

    def import_tail(self, slot: int, num_tokens: int, data: bytes) -> bool:
        return True


@dataclass(slots=True)
class Run:
    """Steps that follow each other with the same sequences.

    first_s: seconds of the first step; each takes rise_s longer than the one before. occupied_s: of
    the first, on one stage of the pipeline. counts: of each rank, the tokens of each decoding
    sequence in each step; None: one each.
    """

    start: float
    steps: int
    first_s: float
    rise_s: float
    occupied_s: float
    plans: list[list[Planned]]
    counts: list[Counts | None]
    prefill_tokens: int

    def end(self, steps: int) -> float:
        """When so many steps are done."""
        return self.start + steps * self.first_s + self.rise_s * (steps * (steps - 1) / 2)

    def stop_at(self, now: float) -> None:
        """Ends it with the step that is under way at `now`."""
        steps = range(1, self.steps + 1)
        self.steps = min(self.steps, 1 + bisect_left(steps, now, key=self.end))


class Lane:
    """One batch of the worker's pipeline; without a pipeline, all that the worker runs."""

    def __init__(self, deployed: Deployed, drafts: Drafts | None, balance: bool) -> None:
        self._deployed = deployed
        self._drafts = drafts
        self._balance = balance and deployed.ranks > 1
        self._held = 0
        self._lasted = 1  # steps of the last run
        self.ranks = [Scheduler(deployed.limits, PerfectPool()) for _ in range(deployed.ranks)]
        self.run: Run | None = None

    def plan(self, now: float) -> bool:
        """Begins the next run; False if there is nothing to compute."""
        hold = self._balance and self._should_hold()
        plans = [rank.plan(now, prefill=not hold) for rank in self.ranks]
        if not any(plans):
            return False
        most = MOST_STEPS if self._deployed.lanes == 1 else 1
        if hold:
            most = min(most, HOLD_STEPS - self._held)
        width = self._drafts.width if self._drafts else 1
        pairs = [(r, p) for r, p in zip(self.ranks, plans, strict=True) if p]
        for rank, plan in pairs:
            most = rank.repeats(plan, most, width) if most > 1 else 1
        counts, steps = self._draw(plans, most)
        self.run = self._timed(now, steps, plans, counts)
        self._held = self._held + steps if hold else 0
        return True

    def commit(self, now: float) -> Run:
        """Takes the results of the run, which is over."""
        run, self.run = self.run, None
        assert run is not None
        self._lasted = run.steps
        for rank, plan, counts in zip(self.ranks, run.plans, run.counts, strict=True):
            if not plan:
                continue
            _advance(rank, plan, counts, run.steps, now)
            if rank.handovers():
                rank.settle()
        return run

    def _should_hold(self) -> bool:
        """Whether prompts wait, since some ranks have one and others only decode."""
        if self._held >= HOLD_STEPS:
            return False
        ready = decoding = 0
        for rank in self.ranks:
            prompts = [s.remaining > 1 for s in rank.active if s.state is not State.FETCHING]
            ready += any(prompts)
            decoding += not all(prompts)
        return 0 < ready < len(self.ranks) and decoding > 0

    def _draw(self, plans: list[list[Planned]], steps: int) -> tuple[list[Counts | None], int]:
        """What the sequences of each rank get from so many steps, or fewer if one ends before."""
        if self._drafts is None:
            return [None] * len(plans), steps
        decodes = [[step.sequence for step in plan if _decodes(step)] for plan in plans]
        if not any(decodes):
            return [None] * len(plans), steps
        computed = np.array([s.computed for each in decodes for s in each], np.int64)
        left = np.array([s.tokens_left for each in decodes for s in each], np.int64)
        # Runs are cut short by who comes: what is drawn beyond that is wasted work.
        steps = min(steps, max(LEAST_DRAWN, 2 * self._lasted))
        counts = self._drafts.run(computed, left, steps)
        edges = np.cumsum([len(each) for each in decodes])[:-1]
        parts = np.split(counts, edges, axis=1)
        return [part if part.shape[1] else None for part in parts], len(counts)

    def _timed(
        self, now: float, steps: int, plans: list[list[Planned]], counts: list[Counts | None]
    ) -> Run:
        timer = self._deployed.timer
        works = [self._work(plan) for plan in plans]
        first = timer.time(works)
        rise = 0.0
        if steps > 1:
            pairs = zip(works, counts, strict=True)
            last = timer.time([self._later(work, each, steps - 1) for work, each in pairs])
            rise = (last.latency_s - first.latency_s) / (steps - 1)
        prefill = sum(work.prefill_tokens for work in works)
        return Run(now, steps, first.latency_s, rise, first.occupied_s, plans, counts, prefill)

    def _work(self, plan: list[Planned]) -> StepWork:
        """One rank's step."""
        window = self._deployed.window or (1 << 62)
        tokens = chunks = attended = read = outputs = decodes = context = 0
        w_attended = w_read = w_context = 0
        for step in plan:
            start, count = step.start, step.count
            if _decodes(step):
                decodes += 1
                context += start + 1
                w_context += min(start + 1, window)
            else:
                tokens += count
                chunks += 1
                attended += attended_tokens(start, count)
                read += start + count
                outputs += step.want_logits
                w_attended += windowed_attended(start, count, window)
                w_read += min(start, window) + count
        return StepWork(
            tokens, chunks, attended, read, outputs, decodes, context, w_attended, w_read, w_context
        )

    def _later(self, work: StepWork, counts: Counts | None, steps: int) -> StepWork:
        """The step of the same decoding sequences, so many steps on."""
        count = work.decode_sequences
        if not count:
            return work
        grown = int(counts[:steps].sum()) if counts is not None else steps * count
        windowed = work.windowed_decode or 0
        if self._deployed.window is not None:
            windowed = min(windowed + grown, self._deployed.window * count)
        return StepWork(
            decode_sequences=count,
            decode_context=work.decode_context + grown,
            windowed_decode=windowed if self._deployed.window is not None else None,
        )


def _decodes(step: Planned) -> bool:
    return step.count == 1 and step.want_logits


def _said(step: Planned) -> Sampled:
    return Sampled(step.sequence.work.ticket)


def _advance(
    rank: Scheduler, plan: list[Planned], counts: Counts | None, steps: int, now: float
) -> None:
    prompts = [step for step in plan if not _decodes(step)]
    if prompts:
        rank.apply(prompts, [_said(step) for step in prompts if step.want_logits], now)
    decodes = [step for step in plan if _decodes(step)]
    totals = [steps] * len(decodes) if counts is None else counts[:steps].sum(axis=0).tolist()
    tokens: list[Listed[int]] = [
        (step.sequence.work.ticket,) * total for step, total in zip(decodes, totals, strict=True)
    ]
    rank.advance(decodes, tokens, now, steps)
