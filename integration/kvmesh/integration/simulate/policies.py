"""How a request's workers are chosen: the live router's way, and simpler ones to compare with.

The simple ones know who is there and who does what, but nothing of caches; of load, only the
least-loaded one. Pure but for the random one, which draws from its own generator.
"""

import random
from collections.abc import Sequence
from typing import Protocol

from kvmesh.services.router.core import Decision, RouteQuery, RouterCore
from kvmesh.services.router.cost import Place, Prompt, WorkerLoad, handover, single


class Policy(Protocol):
    def choose(self, core: RouterCore, query: RouteQuery, now: float) -> Decision: ...


class KvAware:
    """What the live mesh does: the least predicted seconds, cached prefixes counted."""

    def choose(self, core: RouterCore, query: RouteQuery, now: float) -> Decision:
        return core.choose(query, now)


class Pick(Protocol):
    def __call__(self, loads: Sequence[WorkerLoad]) -> WorkerLoad: ...


class Blind:
    """Chooses a prefill and a decode worker by `pick`, each for itself."""

    def __init__(self, pick: Pick, handover_min_tokens: int) -> None:
        self._pick = pick
        self._handover_min = handover_min_tokens

    def choose(self, core: RouterCore, query: RouteQuery, now: float) -> Decision:
        loads = [
            load
            for load in core.workers.loads(core.model.block_size, now)
            if not load.refused
            and load.member_id not in query.exclude
            and query.prompt_tokens <= load.max_prompt
        ]
        generating = [load for load in loads if load.role != "prefill"] or loads
        prefilling = [load for load in loads if load.role == "prefill"]
        if not generating:
            return Decision((), None, "no worker can take it")
        prompt = Prompt(query.prompt_tokens)
        output = min(query.max_tokens, core.model.expected_output)
        decode = self._pick(generating)
        chosen = single(core.model, decode, prompt, output)
        apart = query.handover and query.max_tokens > 1 and decode.role != "prefill"
        if prefilling and apart and query.prompt_tokens >= self._handover_min:
            places = Place(self._pick(prefilling), prompt), Place(decode, prompt)
            chosen = handover(core.model, *places, output)
        chosen.chosen = True
        return Decision((chosen,), chosen, "chosen without regard to caches")


class Random:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"{seed}/policy")

    def __call__(self, loads: Sequence[WorkerLoad]) -> WorkerLoad:
        return self._rng.choice(loads)


class RoundRobin:
    """Each role in turn, by member id."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def __call__(self, loads: Sequence[WorkerLoad]) -> WorkerLoad:
        ordered = sorted(loads, key=lambda load: load.member_id)
        role = ordered[0].role
        last = self._last.get(role, "")
        chosen = next((load for load in ordered if load.member_id > last), ordered[0])
        self._last[role] = chosen.member_id
        return chosen


def least_loaded(loads: Sequence[WorkerLoad]) -> WorkerLoad:
    """The fewest requests, then the fewest prompt tokens that wait."""
    return min(loads, key=lambda load: (load.running, load.backlog_tokens, load.member_id))


def policy_of(name: str, handover_min_tokens: int, seed: int) -> Policy:
    """name: one of scenario.POLICIES."""
    if name == "kv-aware":
        return KvAware()
    picks: dict[str, Pick] = {
        "random": Random(seed),
        "round-robin": RoundRobin(),
        "least-loaded": least_loaded,
    }
    return Blind(picks[name], handover_min_tokens)
