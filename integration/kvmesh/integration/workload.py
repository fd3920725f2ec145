"""What load is made of: requests with lengths, arrival times and shared prefixes. Pure.

The format is that of Mooncake's published traces, one JSON object per line:

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, ..., 13]}

timestamp in milliseconds from the start; each hash id stands for a block of 512 prompt tokens and
all before it, the last one perhaps for fewer. Requests that begin with the same ids share that
prefix. Times are seconds from the start of the load.
"""

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

MOONCAKE_BLOCK = 512  # prompt tokens that one hash id stands for


class TraceError(ValueError):
    """A trace that cannot be used; the message names the line and the field."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. hash_ids: what its prompt is made of, a block each, the last perhaps partly."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by arrival; each hash id stands for `block_tokens` prompt tokens."""

    requests: tuple[TraceRequest, ...]
    block_tokens: int = MOONCAKE_BLOCK

    @property
    def duration_s(self) -> float:
        """From the start to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def longest(self) -> int:
        """Prompt and output tokens of the longest request."""
        return max((r.input_tokens + r.output_tokens for r in self.requests), default=0)


def read_trace(lines: Iterable[str], name: str = "trace", limit: int | None = None) -> Workload:
    """The requests of a Mooncake file, at most `limit` of them, in order of arrival.

    Raises TraceError naming line and field. Blank lines are skipped.
    """
    requests: list[TraceRequest] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(requests) >= limit:
            break
        if line.strip():
            requests.append(_parse(line, f"{name}, line {number}"))
    if not requests:
        raise TraceError(f"{name} has no requests")
    requests.sort(key=lambda request: request.arrival_s)
    return Workload(tuple(requests))


def _parse(line: str, where: str) -> TraceRequest:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TraceError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise TraceError(f"{where}: an object is expected, not {type(record).__name__}")
    arrival_ms = _number(record, "timestamp", where)
    input_tokens = _whole(record, "input_length", where)
    output_tokens = _whole(record, "output_length", where)
    hash_ids = record.get("hash_ids")
    if not isinstance(hash_ids, list) or not all(type(x) is int and x >= 0 for x in hash_ids):
        raise TraceError(f"{where}: hash_ids must be a list of integers from 0, is {hash_ids!r}")
    blocks = -(-input_tokens // MOONCAKE_BLOCK)
    if len(hash_ids) < blocks:
        raise TraceError(
            f"{where}: hash_ids has {len(hash_ids)} ids, input_length {input_tokens} needs {blocks}"
        )
    return TraceRequest(arrival_ms / 1000, input_tokens, output_tokens, tuple(hash_ids[:blocks]))


def _number(record: dict[str, Any], field: str, where: str) -> float:
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise TraceError(f"{where}: {field} must be a number from 0, is {value!r}")
    return float(value)


def _whole(record: dict[str, Any], field: str, where: str) -> int:
    value = record.get(field)
    if type(value) is not int or value < 1:
        raise TraceError(f"{where}: {field} must be an integer from 1, is {value!r}")
    return value


def scaled(workload: Workload, scale: float = 1.0, speed: float = 1.0) -> Workload:
    """The same load with lengths times `scale` and times divided by `speed`.

    Blocks shrink with the lengths, so the shares of prompts that are shared stay. Raises ValueError
    for factors that are not above zero.
    """
    if not (scale > 0 and speed > 0):
        raise ValueError(f"scale is {scale:g} and speed {speed:g}, both must be above 0")
    block = max(1, round(workload.block_tokens * scale))
    # Lengths follow the block as it was rounded, so that each keeps its number of blocks.
    ratio = block / workload.block_tokens
    requests = []
    for request in workload.requests:
        input_tokens = max(1, math.ceil(request.input_tokens * ratio))
        requests.append(
            replace(
                request,
                arrival_s=request.arrival_s / speed,
                input_tokens=input_tokens,
                output_tokens=max(1, round(request.output_tokens * scale)),
                hash_ids=request.hash_ids[: -(-input_tokens // block)],
            )
        )
    return Workload(tuple(requests), block)


def fitting(workload: Workload, max_context: int) -> tuple[Workload, int]:
    """The requests whose prompt and output fit a context, and how many did not."""
    kept = tuple(r for r in workload.requests if r.input_tokens + r.output_tokens <= max_context)
    return replace(workload, requests=kept), len(workload.requests) - len(kept)


@dataclass(frozen=True, slots=True)
class Shape:
    """Synthetic requests: `prefixes` different beginnings of `shared_tokens`, then fresh tokens."""

    input_tokens: int = 128
    output_tokens: int = 64
    shared_tokens: int = 0
    prefixes: int = 1


def closed_loop_load(shape: Shape, count: int, seed: int) -> Workload:
    """All there from the start, for whoever takes the next one when one has ended."""
    return _synthetic(shape, [0.0] * count, seed)


def poisson_load(shape: Shape, rate_per_s: float, count: int, seed: int) -> Workload:
    """Independent arrivals, `rate_per_s` on average; the first one at 0."""
    if rate_per_s <= 0:
        raise ValueError(f"the rate is {rate_per_s:g} requests/s, must be above 0")
    rng = random.Random(f"{seed}/arrivals")
    arrivals = [0.0]
    while len(arrivals) < count:
        arrivals.append(arrivals[-1] + rng.expovariate(rate_per_s))
    return _synthetic(shape, arrivals[:count], seed)


def _synthetic(shape: Shape, arrivals: Sequence[float], seed: int) -> Workload:
    if not 0 <= shape.shared_tokens <= shape.input_tokens:
        raise ValueError(f"{shape.shared_tokens} shared tokens, must be in 0..{shape.input_tokens}")
    # The largest block that both parts are made of whole ones of.
    block = math.gcd(shape.shared_tokens, shape.input_tokens - shape.shared_tokens)
    block = block or shape.input_tokens
    shared = shape.shared_tokens // block
    fresh = (shape.input_tokens - shape.shared_tokens) // block
    rng = random.Random(f"{seed}/prefixes")
    next_id = shape.prefixes * shared
    requests = []
    for arrival in arrivals:
        first = rng.randrange(shape.prefixes) * shared
        ids = (*range(first, first + shared), *range(next_id, next_id + fresh))
        next_id += fresh
        requests.append(TraceRequest(arrival, shape.input_tokens, shape.output_tokens, ids))
    return Workload(tuple(requests), block)


def make_prompt(request: TraceRequest, block_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids of a request's prompt: the same hash id always gives the same tokens."""
    ids: list[int] = []
    for hash_id in request.hash_ids:
        ids += _block(hash_id, block_tokens, vocab_size, seed)
    return ids[: request.input_tokens]


def prompts(workload: Workload, vocab_size: int, seed: int) -> Iterator[list[int]]:
    """One per request, in order."""
    for request in workload.requests:
        yield make_prompt(request, workload.block_tokens, vocab_size, seed)


def _block(hash_id: int, num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    rng = random.Random(f"{seed}/{hash_id}")
    return rng.choices(range(vocab_size), k=num_tokens)
