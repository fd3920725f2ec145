"""What a live mesh of one worker teaches about itself: how long its steps take, by the worker's own
estimate, and how long requests and tokens are under way, by the spans of requests."""

import asyncio
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvmesh.backends.base import Estimate
from kvmesh.integration.loadgen import RequestResult, closed_loop, greedy, open_loop, token_request
from kvmesh.integration.simulate import Overheads
from kvmesh.integration.workload import TraceRequest, Workload, prompts
from kvmesh.services.common import names
from kvmesh.services.common.errors import Unavailable
from kvmesh.services.router.client import InferenceClient
from kvmesh.services.router.cost import CostModel
from kvmesh.services.traces.reader import SpanReader
from kvmesh.services.traces.spans import Span
from kvmesh.v1 import inference_pb2

SEVERAL = 3  # in flight, where the throughput is measured
_PROBES = ((64, 1), (256, 1), (256, 64), (768, 16), (1536, 128))  # prompt and output tokens
_PHASES = (names.SPAN_QUEUE, names.SPAN_PREFILL, names.SPAN_DECODE)
_SPANS_S = 30.0  # until the last span is stored
_POLL_S = 0.2


class LiveMesh:
    """A mesh that is measured. on_done: called for each request that has ended."""

    def __init__(self, client: InferenceClient, vocab: int, on_done: Callable[[], None]) -> None:
        self._client = client
        self._vocab = vocab
        self._on_done = on_done

    async def closed(self, load: Workload, concurrency: int) -> list[RequestResult]:
        return await closed_loop(
            self._client, self._sent(load), concurrency, lambda _: self._on_done()
        )

    async def open(self, load: Workload) -> list[RequestResult]:
        arrivals = [request.arrival_s for request in load.requests]
        return await open_loop(self._client, self._sent(load), arrivals, lambda _: self._on_done())

    def _sent(self, load: Workload) -> list[inference_pb2.GenerateRequest]:
        ids = prompts(load, self._vocab, 0)
        return [
            token_request(prompt, greedy(request.output_tokens))
            for prompt, request in zip(ids, load.requests, strict=True)
        ]

    async def estimate(self) -> Estimate:
        """The worker's estimate, read off what the router predicts with it for an idle worker."""
        rows: list[tuple[float, ...]] = []
        seconds: list[float] = []
        rng = random.Random("probes")
        step_tokens = CostModel().step_tokens
        for count, output in _PROBES:
            ids = [rng.randrange(self._vocab) for _ in range(count)]
            reply = await self._client.route(token_request(ids, greedy(output)))
            chosen = reply.candidates[0]
            steps = math.ceil(count / step_tokens)
            rows.append((steps, count, 0, count * (count + 1) // 2))
            rows.append((output, 0, output, output * (count + output / 2)))
            seconds += [chosen.prefill_s, chosen.decode_s]
        solved = np.linalg.lstsq(np.array(rows, float), np.array(seconds), rcond=None)[0]
        base, prefill, decode, context = (max(0.0, float(value)) for value in solved)
        return Estimate(base, prefill, decode, context)

    async def kv_blocks(self) -> int:
        members = (await self._client.status()).members
        return next(member.blocks_total for member in members if member.kind == "worker")


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    return Estimate(
        statistics.mean(each.base_s for each in estimates),
        statistics.mean(each.prefill_token_s for each in estimates),
        statistics.mean(each.decode_token_s for each in estimates),
        statistics.mean(each.context_token_s for each in estimates),
    )


async def delivery(store: Path, results: Sequence[RequestResult]) -> Overheads:
    """What lies between the client and the worker: medians, by the worker's spans, to its queue and
    from its steps to the client.

    Raises Unavailable if the spans are not stored in time.
    """
    offset_ns = time.time_ns() - time.perf_counter_ns()
    with SpanReader(store) as reader:
        legs = [_legs(each, await _spans(reader, each), offset_ns) for each in results]
    before, first, last = (statistics.median(leg) for leg in zip(*legs, strict=True))
    return Overheads(max(0.0, before), max(0.0, last), max(0.0, first))


def _legs(
    result: RequestResult, spans: dict[str, Span], offset_ns: int
) -> tuple[float, float, float]:
    """Seconds to the worker's queue, from its first token to the client, from its last one."""
    queue, prefill, decode = (spans[name] for name in _PHASES)
    begin_ns = offset_ns + round(result.begin_s * 1e9)
    last_ns = begin_ns + round(result.token_s[-1][0] * 1e9)
    first_ns = begin_ns + round(result.token_s[0][0] * 1e9)
    return (
        (queue.start_ns - begin_ns) / 1e9,
        (first_ns - prefill.end_ns) / 1e9,
        (last_ns - decode.end_ns) / 1e9,
    )


async def _spans(reader: SpanReader, result: RequestResult) -> dict[str, Span]:
    """The request's spans by name, once those of the worker are stored."""
    until = time.monotonic() + _SPANS_S
    while True:
        found = {span.name: span for span in reader.spans(result.trace_id)}
        if all(name in found for name in _PHASES):
            return found
        if time.monotonic() > until:
            raise Unavailable(
                f"the spans of trace {result.trace_id} were not stored within {_SPANS_S:g} s"
            )
        await asyncio.sleep(_POLL_S)


def lesson_requests(seed: int | str, salt: str, count: int) -> Workload:
    """Prompts of 64 to 512 tokens, outputs of 16 to 96, no block in common."""
    rng = random.Random(f"{seed}/{salt}")
    base = rng.randrange(1 << 40)
    return Workload(
        tuple(
            TraceRequest(0.0, rng.randint(64, 512), rng.randint(16, 96), (base + i,))
            for i in range(count)
        ),
        512,
    )
