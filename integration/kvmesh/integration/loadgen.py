"""Sends requests to a mesh and keeps what each one saw. Closed loop: a fixed number in flight."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.services.common.errors import MeshError
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import common_pb2, inference_pb2


@dataclass(slots=True)
class RequestResult:
    """What the client saw of one request. Seconds are the client's own clock."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    ttft_s: float = 0.0  # until the first token
    duration_s: float = 0.0  # until the end of the stream
    finish_reason: int = 0  # kvmesh.v1.FinishReason
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    error: str = ""  # class and message of what ended it; empty for a finished request


async def run_request(
    client: InferenceClient,
    request: inference_pb2.GenerateRequest,
    on_response: Callable[[inference_pb2.GenerateResponse], None] | None = None,
) -> RequestResult:
    """Runs one request to its end. A mesh error is part of the result, not raised."""
    result = RequestResult()
    begin = time.perf_counter()
    try:
        async for response in client.generate(request):
            if not result.ttft_s and (response.token_ids or response.text):
                result.ttft_s = time.perf_counter() - begin
            if on_response is not None:
                on_response(response)
            result.text += response.text
            result.token_ids.extend(response.token_ids)
            if response.finish_reason:
                result.finish_reason = response.finish_reason
                result.usage.CopyFrom(response.usage)
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


def chat_request(
    content: str, sampling: common_pb2.SamplingParams, salt: str = ""
) -> inference_pb2.GenerateRequest:
    """A request with one user message, reporting its token ids."""
    message = inference_pb2.ChatMessage(role="user", content=content)
    return inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatPrompt(messages=[message]),
        sampling=sampling,
        cache_salt=salt,
        echo_token_ids=True,
    )


def token_request(
    ids: Sequence[int], sampling: common_pb2.SamplingParams, salt: str = ""
) -> inference_pb2.GenerateRequest:
    """A request whose prompt is token ids, reporting its token ids."""
    return inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenPrompt(ids=ids),
        sampling=sampling,
        cache_salt=salt,
        echo_token_ids=True,
    )
