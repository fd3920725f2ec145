"""Generations as server-sent events: several choices in one stream, written as they come."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvmesh.services.gateway.answers import DONE, Answer
from kvmesh.services.gateway.middleware import api_error, note_error
from kvmesh.v1 import inference_pb2

MAX_QUEUED = 64  # responses of all choices that the client has not been sent yet

Indexed = tuple[int, inference_pb2.GenerateResponse]
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}


class Generator(Protocol):
    """What runs requests."""

    def generate(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncIterator[inference_pb2.GenerateResponse]: ...


class Finished(Protocol):
    def note(self, index: int, response: inference_pb2.GenerateResponse) -> None: ...

    def usage(self) -> dict[str, Any]: ...


async def merged(
    mesh: Generator, requests: Sequence[inference_pb2.GenerateRequest]
) -> AsyncGenerator[Indexed, None]:
    """The responses of all requests, each with its request's index. Closing it cancels them.

    Raises what the first one that failed raised; the others are cancelled.
    """
    if len(requests) == 1:
        responses: Any = mesh.generate(requests[0])
        async with aclosing(responses):
            async for response in responses:
                yield 0, response
        return
    queue: asyncio.Queue[Indexed | Exception | None] = asyncio.Queue(MAX_QUEUED)
    tasks = [
        asyncio.create_task(_into(queue, index, mesh.generate(request)))
        for index, request in enumerate(requests)
    ]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _into(
    queue: "asyncio.Queue[Indexed | Exception | None]", index: int, responses: Any
) -> None:
    try:
        async with aclosing(responses):
            async for response in responses:
                await queue.put((index, response))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)


class EventStream(Response):
    """Sends `responses` as events. `begin` first: what fails before the first is no stream yet."""

    def __init__(
        self,
        responses: AsyncGenerator[Indexed, None],
        answer: Answer,
        finished: Finished,
        include_usage: bool,
        peer: str,
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._responses = responses
        self._answer = answer
        self._finished = finished
        self._include_usage = include_usage
        self._peer = peer
        self._first: Indexed | None = None
        self._opened: set[int] = set()

    async def begin(self) -> None:
        """Waits for the first response. Raises what prevented it."""
        try:
            self._first = await anext(self._responses, None)
        except BaseException:
            await self._responses.aclose()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._responses) as responses:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            try:
                if self._first is not None:
                    await self._write(send, *self._first)
                async for index, response in responses:
                    await self._write(send, index, response)
                usage = self._finished.usage()
                last = self._answer.usage(usage) + DONE if self._include_usage else DONE
            except Exception as error:
                known = api_error(error, self._peer)
                note_error(scope, known)
                last = b"data: " + known.body() + b"\n\n"
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _write(
        self, send: Send, index: int, response: inference_pb2.GenerateResponse
    ) -> None:
        events = self._answer.chunk(index, response)
        if index not in self._opened:
            self._opened.add(index)
            events = self._answer.opening(index) + events
        if response.finish_reason:
            self._finished.note(index, response)
        if events:
            await send({"type": "http.response.body", "body": events, "more_body": True})
