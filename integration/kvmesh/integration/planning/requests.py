"""From a workload to requests: seeded, pure, in the form of a trace.

Blocks are of 64 tokens, as in the mesh. All sessions of a group begin with the same blocks, and a
turn begins with all blocks of the turn before, its answer included.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.integration.planning import traffic
from kvmesh.integration.planning.lengths import Lengths
from kvmesh.integration.planning.steady import Traffic
from kvmesh.integration.workload import TraceRequest, Workload
from kvmesh.kernels.layout import BLOCK_SIZE

_SESSION_IDS = 1 << 24  # block ids of one session: more than any context has
_MIX_REQUESTS = 4000  # requests whose lengths stand for a workload's


@dataclass(frozen=True, slots=True)
class _Turn:
    session: int
    group: int
    at_s: float
    input_tokens: int
    output_tokens: int
    known_tokens: int  # of the prompt, those that were in the turn before or are shared


def generate(workload: traffic.Workload, count: int, requests_s: float, seed: int) -> Workload:
    """`count` requests that come at `requests_s` per second on average (all at 0 if the scenario
    is not poisson), by arrival.

    Sessions start at independent times; their later turns follow. The window is taken after the
    first sessions have run their course, so that it has turns of all kinds.

    Raises ValueError if count or requests_s is not positive.
    """
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    if not requests_s > 0:
        raise ValueError(f"requests_s is {requests_s:g}, must be greater than 0")
    turns = _window(workload, count, requests_s, seed)
    start = turns[0].at_s
    spread = workload.scenario.arrival == "poisson"
    requests = tuple(
        TraceRequest(
            turn.at_s - start if spread else 0.0,
            turn.input_tokens,
            turn.output_tokens,
            _ids(workload, turn),
        )
        for turn in turns
    )
    return Workload(requests, BLOCK_SIZE)


def interleaved(workload: traffic.Workload, count: int, active: int, seed: int) -> Workload:
    """`count` requests in the order in which a closed loop is to take them: at any time `active`
    sessions are open, each as likely to be next, and one that ends is followed by a new one. Each
    session is there from its first turn on.

    Raises ValueError if count or active is not positive.
    """
    if count < 1 or active < 1:
        raise ValueError(f"count is {count} and active {active}, both must be at least 1")
    rng = np.random.default_rng(seed)
    turns = _endless(workload, rng)
    open_sessions = [next(turns) for _ in range(active)]
    requests = []
    for _ in range(count):
        place = int(rng.integers(active))
        turn = open_sessions[place].pop(0)
        if not open_sessions[place]:
            open_sessions[place] = next(turns)
        ids = _ids(workload, turn)
        requests.append(TraceRequest(0.0, turn.input_tokens, turn.output_tokens, ids))
    return Workload(tuple(requests), BLOCK_SIZE)


def _endless(workload: traffic.Workload, rng: np.random.Generator) -> Iterator[list[_Turn]]:
    session = workload.session
    index = 0
    while True:
        turns = int(session.turns.draw(rng, 1)[0])
        group = int(rng.integers(session.groups))
        yield list(_session(workload, (index, group, 0.0), turns, rng))
        index += 1


def mix(workload: traffic.Workload, seed: int = 0, hits: float = 1.0) -> Traffic:
    """Lengths of prompts and outputs over all turns, and the share of prompt tokens that a cache
    knows; hits: of those that it could know, the share that it does."""
    turns = _window(workload, _MIX_REQUESTS, 1.0, seed)
    inputs = np.sort([turn.input_tokens for turn in turns]).astype(np.float64)
    known = sum(turn.known_tokens for turn in turns) if workload.share_prefixes else 0
    outputs = workload.output
    return Traffic(_empirical(inputs), outputs, hits * known / float(inputs.sum()))


def _empirical(values: npt.NDArray[np.float64]) -> Lengths:
    if values[0] == values[-1]:
        return Lengths.of(float(values[0]))
    shares = np.linspace(0.0, 1.0, 65)
    points = np.quantile(values, shares)
    pairs = tuple(zip(shares.tolist(), points.tolist(), strict=True))
    return Lengths(kind="quantiles", points=pairs, mean_tokens=float(values.mean()))


def _window(workload: traffic.Workload, count: int, requests_s: float, seed: int) -> list[_Turn]:
    rng = np.random.default_rng(seed)
    turns_mean = max(1.0, workload.session.turns.mean)
    span = workload.session.pause_s * workload.session.turns.longest
    # Sessions that began up to a session's span before the window have turns within it.
    lead = int(span * requests_s / turns_mean) if workload.session.turns.longest > 1 else 0
    sessions = lead + int(count / turns_mean * 1.5) + 16
    while True:
        turns = sorted(
            _sessions(workload, sessions, requests_s / turns_mean, rng), key=lambda turn: turn.at_s
        )
        begin = span if lead else 0.0
        inside = [turn for turn in turns if turn.at_s >= begin][:count]
        if len(inside) == count:
            return inside
        sessions *= 2


def _sessions(
    workload: traffic.Workload, count: int, sessions_s: float, rng: np.random.Generator
) -> Iterator[_Turn]:
    session = workload.session
    starts = np.cumsum(rng.exponential(1 / sessions_s, count))
    starts -= starts[0]
    groups = rng.integers(0, session.groups, count)
    lengths = session.turns.draw(rng, count)
    for index in range(count):
        yield from _session(
            workload, (index, int(groups[index]), float(starts[index])), int(lengths[index]), rng
        )


def _session(
    workload: traffic.Workload,
    which: tuple[int, int, float],
    turns: int,
    rng: np.random.Generator,
) -> Iterator[_Turn]:
    index, group, at = which
    session = workload.session
    inputs, outputs = workload.input.draw(rng, turns), workload.output.draw(rng, turns)
    pauses = np.full(turns, session.pause_s)
    if not session.fixed_pause:
        pauses = rng.exponential(session.pause_s, turns)
    said = known = session.shared_tokens
    for turn in range(turns):
        fresh = int(inputs[turn])
        if workload.frames is not None:
            fresh = fresh * workload.frames.tokens + workload.frames.question_tokens
        if turn and session.first_only:
            fresh = session.next_tokens or 1
        prompt = said + fresh
        yield _Turn(index, group, at, prompt, int(outputs[turn]), known)
        said = known = prompt + int(outputs[turn])
        at += float(pauses[turn])


def _ids(workload: traffic.Workload, turn: _Turn) -> tuple[int, ...]:
    shared = workload.session.shared_tokens // BLOCK_SIZE
    first = turn.group * shared
    base = (turn.session + 1) * _SESSION_IDS
    blocks = -(-turn.input_tokens // BLOCK_SIZE)
    own = range(base + shared, base + max(shared, blocks))
    return (*range(first, first + min(shared, blocks)), *own)
