"""The asynchronous client."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeVar

from kvmesh.client.answer import Answer
from kvmesh.client.retry import TIMEOUT_S, Attempts, Retry
from kvmesh.services.common.client import Link
from kvmesh.services.common.errors import MeshError
from kvmesh.services.common.security import Security
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import inference_pb2 as pb

T = TypeVar("T")


class AsyncClient:
    """A mesh at `address` (host:port of its router). Close it, or use it with `async with`.

    All calls raise the MeshError that the mesh answered with, Expired after `timeout_s` seconds.
    """

    def __init__(
        self,
        address: str,
        credentials: Security | None = None,
        retry: Retry | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._link = Link(address, credentials)
        self._inference = InferenceClient(self._link)
        self._retry = retry or Retry()
        self._timeout_s = timeout_s

    async def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The answer as it comes; the last response has finish_reason and usage.

        Closing the iterator cancels the request in the whole mesh, so wrap it in
        contextlib.aclosing where it may not be read to its end.
        """
        attempts = self._attempts(timeout_s)
        begun = False
        while True:
            answer = self._inference.generate(request, attempts.left_s(time.monotonic()))
            try:
                async with aclosing(answer) as responses:  # type: ignore[type-var]
                    async for response in responses:
                        begun = True
                        yield response
                return
            except MeshError as error:
                if begun:
                    raise
                await self._pause(attempts, error)

    async def generate(self, request: pb.GenerateRequest, timeout_s: float | None = None) -> Answer:
        """The whole answer."""
        answer = Answer()
        async with aclosing(self.stream(request, timeout_s)) as responses:
            async for response in responses:
                answer.add(response)
        return answer

    async def route(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> pb.RouteResponse:
        """Where the request would run, and every term of that choice, without running it."""
        return await self._call(lambda left_s: self._inference.route(request, left_s), timeout_s)

    async def models(self, timeout_s: float | None = None) -> list[pb.ModelInfo]:
        """The models that the mesh serves."""
        return list((await self._call(self._inference.list_models, timeout_s)).models)

    async def status(self, timeout_s: float | None = None) -> pb.MeshStatusResponse:
        """The members of the mesh with their load."""
        return await self._call(self._inference.status, timeout_s)

    async def wait_connected(self, timeout_s: float) -> None:
        """Returns once a connection stands. Raises TimeoutError if none does by then."""
        await asyncio.wait_for(self._link.channel.channel_ready(), timeout_s)

    async def close(self) -> None:
        await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _attempts(self, timeout_s: float | None) -> Attempts:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        return Attempts(self._retry, seconds, time.monotonic())

    async def _call(self, call: Callable[[float], Awaitable[T]], timeout_s: float | None) -> T:
        attempts = self._attempts(timeout_s)
        while True:
            try:
                return await call(attempts.left_s(time.monotonic()))
            except MeshError as error:
                await self._pause(attempts, error)

    async def _pause(self, attempts: Attempts, error: MeshError) -> None:
        await asyncio.sleep(attempts.pause_s(error, time.monotonic(), random.random()))
