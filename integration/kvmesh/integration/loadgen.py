"""Sends requests to a mesh and keeps what each one saw.

Closed loop: a fixed number in flight. Open loop: each at its time, whatever became of those before
it, and timed from that time, so that a client that falls behind hides no waiting.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.client import chat, tokens
from kvmesh.services.common.errors import MeshError
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import common_pb2, inference_pb2


@dataclass(slots=True)
class RequestResult:
    """What the client saw of one request. Seconds are the client's own clock.

    The request was due at `begin_s`, and sent late_s after that.
    token_s: seconds from then to each response with tokens, and how many tokens it had.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    begin_s: float = 0.0
    late_s: float = 0.0
    ttft_s: float = 0.0  # until the first token
    duration_s: float = 0.0  # until the end of the stream
    token_s: list[tuple[float, int]] = field(default_factory=list)
    finish_reason: int = 0  # kvmesh.v1.FinishReason
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    trace_id: str = ""  # 32 hex digits
    error: str = ""  # class and message of what ended it; empty for a finished request


async def run_request(
    client: InferenceClient,
    request: inference_pb2.GenerateRequest,
    on_response: Callable[[inference_pb2.GenerateResponse], None] | None = None,
    due_s: float | None = None,
) -> RequestResult:
    """Runs one request to its end. A mesh error is part of the result, not raised.

    due_s: when it should have been sent, on time.perf_counter; without it, now.
    """
    now = time.perf_counter()
    begin = now if due_s is None else due_s
    result = RequestResult(begin_s=begin, late_s=now - begin)
    try:
        async for response in client.generate(request):
            if response.token_ids or response.text:
                since = time.perf_counter() - begin
                result.ttft_s = result.ttft_s or since
                result.token_s.append((since, len(response.token_ids)))
            if on_response is not None:
                on_response(response)
            result.text += response.text
            result.token_ids.extend(response.token_ids)
            if response.finish_reason:
                result.finish_reason = response.finish_reason
                result.usage.CopyFrom(response.usage)
                result.trace_id = response.trace_id
    except MeshError as error:
        result.error = f"{type(error).__name__}: {error}"
    result.duration_s = time.perf_counter() - begin
    return result


async def closed_loop(
    client: InferenceClient,
    requests: Sequence[inference_pb2.GenerateRequest],
    concurrency: int,
    on_done: Callable[[RequestResult], None] | None = None,
) -> list[RequestResult]:
    """Runs all requests, `concurrency` at a time; results in the order of the requests."""
    results: list[RequestResult | None] = [None] * len(requests)
    waiting = iter(range(len(requests)))

    async def client_loop() -> None:
        for index in waiting:
            result = results[index] = await run_request(client, requests[index])
            if on_done is not None:
                on_done(result)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(client_loop())
    return [result for result in results if result is not None]


async def open_loop(
    client: InferenceClient,
    requests: Sequence[inference_pb2.GenerateRequest],
    arrivals_s: Sequence[float],
    on_done: Callable[[RequestResult], None] | None = None,
) -> list[RequestResult]:
    """Sends each request at its time, seconds from now; results in the order of the requests."""
    start = time.perf_counter()

    async def run(request: inference_pb2.GenerateRequest, arrival_s: float) -> RequestResult:
        due = start + arrival_s
        await asyncio.sleep(due - time.perf_counter())
        result = await run_request(client, request, due_s=due)
        if on_done is not None:
            on_done(result)
        return result

    pairs = zip(requests, arrivals_s, strict=True)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(*pair)) for pair in pairs]
    return [task.result() for task in tasks]


def chat_request(
    content: str, sampling: common_pb2.SamplingParams, salt: str = ""
) -> inference_pb2.GenerateRequest:
    """A request with one user message, reporting its token ids."""
    request = chat(content, cache_salt=salt, echo_token_ids=True)
    request.sampling.CopyFrom(sampling)
    return request


def greedy(output_tokens: int) -> common_pb2.SamplingParams:
    """Exactly so many tokens: what is measured must not depend on what is said."""
    return common_pb2.SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)


def token_request(
    ids: Sequence[int], sampling: common_pb2.SamplingParams, salt: str = ""
) -> inference_pb2.GenerateRequest:
    """A request whose prompt is token ids, reporting its token ids."""
    request = tokens(ids, cache_salt=salt, echo_token_ids=True)
    request.sampling.CopyFrom(sampling)
    return request
