"""The requests of one edge, on one stream: what many of them say in one step is one message."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

from kvmesh.services.common.callers import AUTHORIZATION
from kvmesh.services.common.errors import InvalidRequest, MeshError, status_number
from kvmesh.services.common.telemetry import extract
from kvmesh.services.router.generation import Asked, Generation
from kvmesh.services.router.parts import RouterParts
from kvmesh.v1 import common_pb2
from kvmesh.v1 import inference_pb2 as pb

logger = logging.getLogger(__name__)

MAX_UNREAD = 10_000  # answers that the edge has not taken; no more requests are read beyond


class ManySession:
    """timeout_s: of each request."""

    def __init__(self, parts: RouterParts, timeout_s: float) -> None:
        self._parts = parts
        self._timeout_s = timeout_s
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._said: list[pb.SaidItem] = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()  # answers were taken
        self._ended = False

    async def read(self, batches: AsyncIterator[pb.GenerateBatch]) -> None:
        """Starts and cancels what the edge asks for, until it has no more. Raises MeshError."""
        try:
            async for batch in batches:
                for item in batch.items:
                    self._take(item)
                while len(self._said) > MAX_UNREAD:
                    self._room.clear()
                    await self._room.wait()
        finally:
            self._ended = True
            self._wake.set()

    async def next(self) -> pb.SaidBatch | None:
        """All that was said since the last one, once there is something; None at the end."""
        while not self._said and not self._ended:
            self._wake.clear()
            await self._wake.wait()
        said, self._said = self._said, []
        self._room.set()
        return pb.SaidBatch(items=said) if said else None

    async def close(self) -> None:
        """Cancels what still runs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, item: pb.GenerateItem) -> None:
        if item.cancel:
            task = self._tasks.get(item.id)
            if task is not None:
                task.cancel()
            return
        if item.id in self._tasks:
            raise InvalidRequest(f"request {item.id} runs on this stream already")
        task = self._tasks[item.id] = asyncio.create_task(self._run(item))
        task.add_done_callback(lambda _: self._tasks.pop(item.id, None))

    async def _run(self, item: pb.GenerateItem) -> None:
        try:
            async with aclosing(self._generation(item).run()) as responses:  # type: ignore[type-var]
                async for response in responses:
                    self._say(pb.SaidItem(id=item.id, response=response))
        except MeshError as error:
            if type(error) is MeshError:
                logger.error("a bug ended a request", exc_info=error)
            self._say(pb.SaidItem(id=item.id, error=_shown(error)))
        except Exception:
            logger.exception("unexpected error in a request")
            self._say(pb.SaidItem(id=item.id, error=_shown(MeshError("internal error"))))

    def _generation(self, item: pb.GenerateItem) -> Generation:
        """Raises Unauthenticated or Forbidden: each request is its caller's, not the edge's."""
        tenant = self._parts.callers.identify([(AUTHORIZATION, item.authorization)])
        trace = (("traceparent", item.trace.traceparent), ("tracestate", item.trace.tracestate))
        parent = extract([(name, value) for name, value in trace if value])
        return Generation(self._parts, Asked(tenant, item.request, parent), self._timeout_s)

    def _say(self, item: pb.SaidItem) -> None:
        self._said.append(item)
        self._wake.set()


def _shown(error: MeshError) -> common_pb2.RequestError:
    milliseconds = max(1, round(error.retry_after_s * 1000)) if error.retry_after_s > 0 else 0
    return common_pb2.RequestError(
        code=status_number(error),
        message=str(error),
        retry_after_ms=milliseconds,
        reason=error.reason,
    )
