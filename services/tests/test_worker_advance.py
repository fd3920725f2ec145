"""Many decode steps taken at once are the same as one after another."""

import random

from hypothesis import given, note, seed, settings
from hypothesis import strategies as st
from worker_fakes import LAYOUT

from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.sampling import SamplingSettings
from kvmesh.services.kvcache.keys import root_key
from kvmesh.services.worker.limits import Limits
from kvmesh.services.worker.sampler import Sampled
from kvmesh.services.worker.scheduler import Scheduler
from kvmesh.services.worker.sequence import Sequence, Work

ROOT = root_key(LAYOUT.fingerprint, LAYOUT.codec, BLOCK_SIZE, "")


class Pool:
    def verify(self, block: int) -> bool:
        return True

    def import_block(self, block: int, data: bytes) -> bool:
        return True

    def import_tail(self, slot: int, num_tokens: int, data: bytes) -> bool:
        return True


class Side:
    """One scheduler, each of whose sequences says its own ticket again and again."""

    def __init__(self, limits: Limits) -> None:
        self.scheduler = Scheduler(limits, Pool())
        self.now = 0
        self.sequences: list[Sequence] = []
        self.said: dict[int, list[int]] = {}
        self.repeated = 0

    def submit(self, work: Work) -> None:
        self.sequences.append(self.scheduler.submit(work, self.now))

    def until(self, now: int, most: int) -> None:
        """Steps up to `now`, up to `most` at once."""
        while self.now < now:
            plan = self.scheduler.plan(self.now)
            steps = self.scheduler.repeats(plan, min(most, now - self.now)) if plan else 1
            self.now += steps
            tickets = [p.sequence.work.ticket for p in plan if p.want_logits]
            if steps == 1:
                self.scheduler.apply(plan, [Sampled(t) for t in tickets], self.now)
            else:
                self.repeated += steps
                self.scheduler.advance(plan, [(t,) * steps for t in tickets], self.now, steps)
            self.scheduler.settle()
            for update in self.scheduler.drain_updates():
                self.said.setdefault(update.sequence.work.ticket, []).extend(update.tokens)

    def state(self) -> object:
        cache = self.scheduler.cache
        c = self.scheduler.counters
        return (
            self.said,
            set(cache.keys()),
            cache.available,
            (c.preemptions, c.steps, c.batched, c.tokens_generated, c.tokens_prefilled),
            [
                (s.state, s.finish, s.length, s.computed, s.steps, s.sealed_here, len(s.blocks))
                for s in self.sequences
            ],
        )


@seed(11)
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_steps_at_once_are_steps_one_by_one(number: int) -> None:
    rng = random.Random(number)
    limits = Limits(
        slots=rng.randint(1, 5), num_blocks=rng.randint(6, 24), max_context=1024,
        step_tokens=rng.choice([64, 200]), prefill_chunk=rng.choice([16, 64]),
    )  # fmt: skip
    note(f"limits {limits}")
    single, many = Side(limits), Side(limits)
    for ticket in range(100, 100 + rng.randint(1, 8)):
        prompt = (rng.randrange(3),) * rng.randint(1, 300)
        wanted = SamplingSettings(max_tokens=rng.randint(1, 400), ignore_eos=True)
        work = Work(ticket, f"r{ticket}", prompt, len(prompt), wanted, ROOT)
        gap = rng.choice([0, 1, 7, 150])
        for side, most in ((single, 1), (many, 1000)):
            side.submit(work)
            side.until(side.now + gap, most)
            side.scheduler.check_integrity()
        assert single.state() == many.state()
    for side, most in ((single, 1), (many, 1000)):
        while side.scheduler.active:
            side.until(side.now + 50, most)
    assert single.state() == many.state()


def test_a_long_decode_is_taken_at_once() -> None:
    side = Side(Limits(2, 40, 1024))
    side.submit(Work(1, "r1", (5,) * 100, 100, SamplingSettings(max_tokens=300), ROOT))
    side.until(1, 1000)
    plan = side.scheduler.plan(1)
    assert side.scheduler.repeats(plan, 1000) == 299
    assert side.scheduler.repeats(plan, 20) == 20
    side.until(300, 1000)
    assert side.said[1] == [1] * 300 and not side.scheduler.active
