"""The one open stream to a worker, and which request each of its answers belongs to."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

from kvmesh.services.common.errors import MeshError, Unavailable
from kvmesh.services.router.core import RouterCore
from kvmesh.services.worker.client import WorkerClient
from kvmesh.v1 import mesh_pb2, worker_pb2

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0


class Receiver(Protocol):
    """Takes one request's answers, in the event loop and without waiting."""

    def on_update(self, update: worker_pb2.TokenUpdate) -> None: ...

    def on_lost(self) -> None:
        """The stream broke: the worker has cancelled the request, no update follows."""
        ...


class WorkerLink:
    """Attached to one life of a worker until closed; attaches again when the stream breaks.

    What is submitted and cancelled in one turn of the event loop goes out as one message.
    """

    def __init__(
        self,
        member: mesh_pb2.Member,
        client: WorkerClient,
        core: RouterCore,
        on_change: Callable[[], None],
    ) -> None:
        self.member = member
        self._id = member.member_id
        self._client = client
        self._core = core
        self._on_change = on_change
        self._receivers: dict[str, Receiver] = {}
        self._submits: list[worker_pb2.Submit] = []
        self._cancels: list[worker_pb2.Cancel] = []
        self._wake = asyncio.Event()
        self._connected = False
        self._closed = False
        self._resync = False
        self._task = asyncio.create_task(self._run(), name=f"link {self._id}")

    def submit(self, submit: worker_pb2.Submit, receiver: Receiver) -> None:
        """Sends a request there. Raises Unavailable if the stream is not open."""
        if not self._connected:
            raise Unavailable(f"no stream to {self._id} at {self.member.address}")
        self._receivers[submit.request_id] = receiver
        self._submits.append(submit)
        self._wake.set()

    def release(self, request_id: str) -> None:
        """Nothing more is wanted of this request; cancels it if it has not ended there."""
        if self._receivers.pop(request_id, None) is None:
            return
        self._cancels.append(worker_pb2.Cancel(request_id=request_id))
        self._wake.set()

    async def close(self) -> None:
        """Ends the stream; requests that are still on it are lost. Leaves the core alone."""
        self._closed = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            attached = False
            try:
                async with aclosing(self._client.attach(self._messages())) as answers:  # type: ignore[type-var]
                    async for answer in answers:
                        attached = self._take(answer) or attached
                        if self._resync and not self._receivers:
                            logger.warning("%s: events are missing, attaching again", self._id)
                            break
            except MeshError as error:
                logger.warning("stream to %s broke: %s", self._id, error)
            finally:
                self._broken()
            backoff_s = FIRST_BACKOFF_S if attached else min(MAX_BACKOFF_S, 2 * backoff_s)
            await asyncio.sleep(backoff_s)

    async def _messages(self) -> AsyncIterator[worker_pb2.RouterMessage]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not (self._submits or self._cancels):
                continue
            message = worker_pb2.RouterMessage(submit=self._submits, cancel=self._cancels)
            self._submits = []
            self._cancels = []
            yield message

    def _take(self, answer: worker_pb2.WorkerMessage) -> bool:
        """Whether this was the first message of a stream."""
        hello = answer.HasField("hello")
        if hello and answer.hello.member_id != self._id:
            raise Unavailable(f"{self.member.address} is now {answer.hello.member_id}")
        if answer.HasField("events"):
            self._apply(answer)
        if answer.HasField("load"):
            self._core.workers.reported(self._id, answer.load)
        for update in answer.updates:
            if update.finish_reason:
                receiver = self._receivers.pop(update.request_id, None)
            else:
                receiver = self._receivers.get(update.request_id)
            if receiver is not None:
                receiver.on_update(update)
        if hello:
            self._connected = True
            self._core.workers.connected(self._id, True)
            self._on_change()
        elif answer.load.draining:
            self._on_change()
        return hello

    def _apply(self, answer: worker_pb2.WorkerMessage) -> None:
        applied = self._core.index.apply(self._id, answer.events)
        if applied == "gap" and not self._resync:
            # A snapshot comes with a new stream only, which would cost the requests on this one:
            # until there are none, the router knows of no blocks there.
            self._resync = True
            self._forget_blocks()
        elif applied == "stale":
            logger.warning("%s: events of another incarnation are ignored", self._id)

    def _forget_blocks(self) -> None:
        self._core.holder_joined(self._id, self.member.incarnation, shard=False)

    def _broken(self) -> None:
        self._connected = False
        self._resync = False
        self._submits = []
        self._cancels = []
        if not self._closed:  # else another life of the worker may be in the core already
            self._core.workers.connected(self._id, False)
            self._forget_blocks()
        lost = list(self._receivers.values())
        self._receivers.clear()
        for receiver in lost:
            receiver.on_lost()
        self._on_change()
