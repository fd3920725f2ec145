"""Where a request runs: the one decision behind Generate, Route and the simulation. Pure.

Each worker that generates is a candidate; when enough of the prompt is uncached, so is each pair of
a prefill and a decode worker. The smallest predicted time wins.
"""

import heapq
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvmesh.services.common.config import RouterConfig
from kvmesh.services.router.cost import (
    Candidate,
    CostModel,
    Place,
    Prompt,
    handover,
    output_seconds,
    prompt_seconds,
    single,
)
from kvmesh.services.router.index import Match, PrefixIndex
from kvmesh.services.router.speculation import Life, Speculation
from kvmesh.services.router.workers import WorkerTable

SPECULATION_S = 2.0  # beyond the predicted time to the first token
# Of more than SHORTLIST**2 pairs, those of the prefill and the decode workers that are best by
# themselves are weighed: a mesh of hundreds of workers has thousands of pairs.
SHORTLIST = 8


@dataclass(frozen=True, slots=True)
class RouteQuery:
    """A request to be placed.

    keys: of the prompt's full blocks, in order. max_tokens: most output tokens. exclude: workers
    that failed it. handover: false once the request has begun to generate.
    """

    request_id: str
    prompt_tokens: int
    keys: Sequence[bytes]
    max_tokens: int
    exclude: frozenset[str] = frozenset()
    handover: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """candidates: best first, rejected ones last. chosen: None if no worker can take it."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    reason: str


class RouterCore:
    """What the router knows of workers and blocks, and the choice made from it."""

    def __init__(self, config: RouterConfig, model: CostModel | None = None) -> None:
        self._handover_min = config.handover_min_tokens
        self._patience = config.handover_patience
        self._speculation = Speculation()
        self.model = model or CostModel()
        self.index = PrefixIndex(config.index_bytes)
        self.workers = WorkerTable()

    def holder_joined(self, member_id: str, incarnation: int, shard: bool) -> None:
        """A new life of a process that holds blocks; nothing is known of it yet."""
        self.index.add(member_id, incarnation, shard)

    def holder_left(self, member_id: str) -> None:
        """None of its entries is used from now on."""
        self.index.remove(member_id)

    def choose(self, query: RouteQuery, now: float) -> Decision:
        """Changes nothing but how recently the prompt's blocks were matched."""
        size = self.model.block_size
        # At least one token is always computed: its logits give the first output token.
        keys = query.keys[: max(0, query.prompt_tokens - 1) // size]
        match = self.index.match(keys, self._soon(keys, now))
        places = self._places(query, match, now)
        output = min(query.max_tokens, self.model.expected_output)
        singles = self._singles(places, output)
        pairs: list[Candidate] = []
        if query.handover:
            pairs = self._pairs(query, places, output)
        if pairs:
            _reject_slow_prefill(singles, pairs, self._worth(query, places), self._patience)
        return _decide(query, [*singles, *pairs])

    def expect(self, query: RouteQuery, chosen: Candidate, now: float) -> None:
        """The request was sent to `chosen`, whose workers will hold its prompt's blocks shortly."""
        ready = now + chosen.queue_s + chosen.prefill_s + chosen.transfer_s + SPECULATION_S
        for worker in {chosen.prefill_worker, chosen.decode_worker} - {""}:
            state = self.workers.get(worker)
            if state is not None:
                life = (worker, state.member.incarnation)
                self._speculation.expect(life, query.keys, now, ready)

    def _soon(self, keys: Sequence[bytes], now: float) -> list[int]:
        soon: list[int] = []
        bits: dict[Life, int] = {}
        for key in keys:
            holders = self._speculation.holders(key, now)
            if not holders:
                break
            mask = 0
            for life in holders:
                bit = bits.get(life)
                if bit is None:
                    bit = bits[life] = self.index.bit_of(*life)
                mask |= bit
            soon.append(mask)
        return soon

    def _places(self, query: RouteQuery, match: Match, now: float) -> list[Place]:
        size = self.model.block_size
        places = []
        for load in self.workers.loads(size, now):
            held = match.local.get(load.member_id, 0)
            prompt = Prompt(query.prompt_tokens, held * size, match.remote_after(held) * size)
            if not load.refused and load.member_id in query.exclude:
                load = replace(load, refused="failed this request before")
            if not load.refused and query.prompt_tokens > load.max_prompt:
                refused = f"{query.prompt_tokens} prompt tokens, at most {load.max_prompt} fit"
                load = replace(load, refused=refused)
            places.append(Place(load, prompt))
        return places

    def _singles(self, places: Sequence[Place], output: int) -> list[Candidate]:
        generating = [p for p in places if p.load.role != "prefill"]
        # Any worker can do everything: with no other left, one for prefill generates as well.
        stranded = all(p.load.refused for p in generating)
        found = []
        alike: dict[tuple[object, ...], Candidate] = {}
        for place in places:
            candidate = self._single(place, output, alike)
            if place.load.role == "prefill" and not stranded and not candidate.rejected:
                candidate.rejected = "role prefill: others generate"
            found.append(candidate)
        return found

    def _single(
        self, place: Place, output: int, alike: dict[tuple[object, ...], Candidate]
    ) -> Candidate:
        """alike: those of this decision, by all that their seconds depend on: of hundreds of
        workers, most hold nothing of the prompt, and many do nothing."""
        load, prompt = place.load, place.prompt
        key = load.estimate, load.running, load.backlog_tokens, prompt.local, prompt.remote
        known = alike.get(key)
        if known is None:
            known = alike[key] = single(self.model, load, prompt, output)
            return known
        return Candidate(
            "", load.member_id, prompt, known.queue_s, known.prefill_s, known.transfer_s,
            known.decode_s, load.running, load.refused,
        )  # fmt: skip

    def _pairs(self, query: RouteQuery, places: Sequence[Place], output: int) -> list[Candidate]:
        prefills = [place for place in places if place.load.role == "prefill"]
        decodes = [place for place in places if place.load.role != "prefill"]
        if len(prefills) * len(decodes) > SHORTLIST**2:
            prefills = _shortlist(prefills, lambda place: prompt_seconds(self.model, place))
            decodes = _shortlist(decodes, lambda place: output_seconds(self.model, place, output))
        found = []
        for prefill in prefills:
            for decode in decodes:
                skip = self._skip(query, decode)
                if skip:
                    ids = prefill.load.member_id, decode.load.member_id
                    pair = Candidate(*ids, prefill.prompt, rejected=skip)
                else:
                    pair = handover(self.model, prefill, decode, output)
                found.append(pair)
        return found

    def _worth(self, query: RouteQuery, places: Sequence[Place]) -> set[str]:
        """The workers that a hand-over to is worth it, those beyond the shortlist too."""
        decodes = (place for place in places if place.load.role != "prefill")
        return {place.load.member_id for place in decodes if not self._skip(query, place)}

    def _skip(self, query: RouteQuery, decode: Place) -> str:
        """Why a hand-over to this worker is not worth it; empty if it may be."""
        if query.max_tokens <= 1:
            return "one output token: nothing to hand over"
        uncached = decode.prompt.uncached
        if uncached < self._handover_min:
            return f"{uncached} uncached tokens, hand-over from {self._handover_min}"
        return ""


def _shortlist(places: Sequence[Place], seconds: Callable[[Place], float]) -> list[Place]:
    usable = [place for place in places if not place.load.refused]
    return heapq.nsmallest(SHORTLIST, usable or places, key=seconds)


def _reject_slow_prefill(
    singles: Sequence[Candidate],
    pairs: Sequence[Candidate],
    worth: set[str],
    patience: float,
) -> None:
    """Keeps long prompts off workers that decode, unless every hand-over would take `patience`
    times as long: their own prefill would hold up what they decode."""
    fastest = min((pair.total_s for pair in pairs if not pair.rejected), default=math.inf)
    for alone in singles:
        if alone.rejected or alone.decode_worker not in worth:
            continue
        if fastest <= patience * alone.total_s:
            alone.rejected = f"{alone.prompt.uncached} uncached tokens: hand over after prefill"


def _decide(query: RouteQuery, candidates: Sequence[Candidate]) -> Decision:
    def cost(candidate: Candidate) -> tuple[bool, float, int]:
        return bool(candidate.rejected), round(candidate.total_s, 7), candidate.running

    def share(candidate: Candidate) -> tuple[int, str]:
        pair = f"{candidate.prefill_worker}>{candidate.decode_worker}"
        # Equally good ones are shared out by request, the same way each time.
        return zlib.crc32(f"{query.request_id}/{pair}".encode()), pair

    ordered = sorted(candidates, key=cost)
    if len(ordered) > 1 and cost(ordered[1]) == cost(ordered[0]):
        least = cost(ordered[0])
        equal = len(list(itertools.takewhile(lambda each: cost(each) == least, ordered)))
        ordered[:equal] = sorted(ordered[:equal], key=share)
    if not ordered:
        return Decision((), None, "no worker is in the mesh")
    if ordered[0].rejected:
        why = "; ".join(f"{c.decode_worker}: {c.rejected}" for c in ordered if not c.prefill_worker)
        return Decision(tuple(ordered), None, f"no worker can take it ({why})")
    chosen = ordered[0]
    chosen.chosen = True
    return Decision(tuple(ordered), chosen, _reason(ordered, chosen))


def _reason(ordered: Sequence[Candidate], chosen: Candidate) -> str:
    prompt = chosen.prompt
    if chosen.prefill_worker:
        where = f"{chosen.prefill_worker} prefills and hands over to {chosen.decode_worker}"
    else:
        where = f"{chosen.decode_worker} does both"
    text = (
        f"{where}: {prompt.local} of {prompt.tokens} prompt tokens cached there, "
        f"{prompt.remote} on shards, {prompt.uncached} to compute; "
        f"predicted {chosen.total_s:.4f} s"
    )
    if len(ordered) > 1 and not ordered[1].rejected:
        text += f", next best {ordered[1].total_s:.4f} s"
    return text
