"""Workers and shards on real gRPC, and a router's side of the Attach stream."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from kvmesh.backends.base import Model
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import KvCacheConfig, MeshConfig, WorkerConfig
from kvmesh.services.common.process import ProcessContext
from kvmesh.services.common.security import Security
from kvmesh.services.common.server import BoundServer, Listener, Service
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.services.kvcache.service import KvCacheService
from kvmesh.services.worker.client import WorkerClient
from kvmesh.services.worker.scheduler import Scheduler
from kvmesh.services.worker.service import WorkerService
from kvmesh.v1 import mesh_pb2, mesh_pb2_grpc, worker_pb2

TIMEOUT = 20.0


class RecordingMesh(mesh_pb2_grpc.MeshServicer):
    """The router's side of membership."""

    def __init__(self) -> None:
        self.members: list[mesh_pb2.Member] = []
        self.left: list[str] = []

    async def Register(self, request: Any, context: Any) -> Any:
        self.members.append(request.member)
        return mesh_pb2.RegisterResponse(lease_ms=60_000)

    async def Renew(self, request: Any, context: Any) -> Any:
        return mesh_pb2.RenewResponse(lease_ms=60_000)

    async def Leave(self, request: Any, context: Any) -> Any:
        self.left.append(request.member_id)
        return mesh_pb2.LeaveResponse()


@asynccontextmanager
async def mesh() -> AsyncIterator[tuple[RecordingMesh, str]]:
    recording = RecordingMesh()
    bound = BoundServer(Listener("127.0.0.1", 0, ("kvmesh.v1.Mesh",)), Security())
    mesh_pb2_grpc.add_MeshServicer_to_server(recording, bound.server)
    try:
        yield recording, await bound.bind()
    finally:
        await bound.stop(0)


@asynccontextmanager
async def served(service: Service) -> AsyncIterator[str]:
    """The address of a service that has started."""
    (listener,) = service.listeners
    bound = BoundServer(listener, Security())
    service.register([bound.server])
    try:
        address = await bound.bind()
        await service.start([address])
        yield address
    finally:
        await bound.stop(0)
        await service.close()


@asynccontextmanager
async def worker(
    model: Model, mesh_address: str = "", **settings: Any
) -> AsyncIterator[tuple[WorkerService, str]]:
    config = MeshConfig(workers=(WorkerConfig(**settings),))
    telemetry = Telemetry("worker", "worker-0")
    context = ProcessContext(config, "worker-0", mesh_address, Security(), telemetry, 77)
    service = WorkerService(context, lambda config, worker: model)
    try:
        async with served(service) as address:
            yield service, address
    finally:
        telemetry.close()


@asynccontextmanager
async def shard() -> AsyncIterator[tuple[KvCacheService, str]]:
    config = MeshConfig(kvcache=KvCacheConfig(max_bytes=8 << 20))
    telemetry = Telemetry("kvcache", "kvcache-0")
    try:
        async with mesh() as (_, mesh_address):
            context = ProcessContext(config, "kvcache-0", mesh_address, Security(), telemetry, 5)
            service = KvCacheService(context)
            async with served(service) as address:
                yield service, address
    finally:
        telemetry.close()


class Attached:
    """What a router has heard on one stream. Waits end with TimeoutError, never silently."""

    def __init__(self, address: str) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.updates: dict[str, list[worker_pb2.TokenUpdate]] = {}
        self.held: set[bytes] = set()
        self.event_numbers: list[int] = []
        self.messages = 0
        self.load = worker_pb2.LoadReport()
        self.hello: worker_pb2.Hello | None = None
        self._outgoing: asyncio.Queue[worker_pb2.RouterMessage | None] = asyncio.Queue()
        self._link = Link(address)
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(self._read())

    async def submit(self, request_id: str, tokens: Sequence[int], **fields: Any) -> None:
        """cancelled: with a Cancel in the same message."""
        cancelled = fields.pop("cancelled", False)
        sampling = fields.pop("sampling", {})
        fields.setdefault("num_prompt_tokens", len(tokens))
        submit = worker_pb2.Submit(request_id=request_id, token_ids=tokens, **fields)
        submit.sampling.MergeFrom(type(submit.sampling)(**{"max_tokens": 20, **sampling}))
        cancels = [worker_pb2.Cancel(request_id=request_id)] if cancelled else []
        await self._outgoing.put(worker_pb2.RouterMessage(submit=[submit], cancel=cancels))

    async def cancel(self, request_id: str) -> None:
        cancel = worker_pb2.Cancel(request_id=request_id)
        await self._outgoing.put(worker_pb2.RouterMessage(cancel=[cancel]))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT), self._news:
            await self._news.wait_for(lambda: condition() or self._task.done())
        if self._task.done() and not self._task.cancelled():
            self._task.result()
        assert condition(), "the stream ended first"

    async def end_of(self, request_id: str) -> worker_pb2.TokenUpdate:
        await self.until(lambda: bool(self.ends(request_id)))
        (end,) = self.ends(request_id)
        return end

    def ends(self, request_id: str) -> list[worker_pb2.TokenUpdate]:
        return [u for u in self.updates.get(request_id, []) if u.finish_reason]

    async def close(self, abruptly: bool = False) -> None:
        """Abruptly: the connection breaks; else the router's half of the stream ends."""
        if abruptly:
            await self._link.close()
        await self._outgoing.put(None)
        with suppress(Exception, asyncio.CancelledError):
            async with asyncio.timeout(TIMEOUT):
                await self._task
        await self._link.close()

    async def _read(self) -> None:
        try:
            async for message in WorkerClient(self._link).attach(self._messages()):
                async with self._news:
                    self._hear(message)
                    self._news.notify_all()
        finally:
            async with self._news:
                self._news.notify_all()

    def _hear(self, message: worker_pb2.WorkerMessage) -> None:
        self.messages += 1
        if message.HasField("hello"):
            assert self.hello is None
            self.hello = message.hello
        if message.HasField("load"):
            self.load = message.load
        if message.HasField("events"):
            self.event_numbers.append(message.events.sequence)
            self.held |= set(message.events.stored)
            self.held -= set(message.events.removed)
        for update in message.updates:
            self.updates.setdefault(update.request_id, []).append(update)
            self.tokens.setdefault(update.request_id, []).extend(update.token_ids)

    async def _messages(self) -> AsyncIterator[worker_pb2.RouterMessage]:
        while (message := await self._outgoing.get()) is not None:
            yield message


@asynccontextmanager
async def attached(address: str) -> AsyncIterator[Attached]:
    router = Attached(address)
    try:
        await router.until(lambda: router.hello is not None)
        yield router
    finally:
        await router.close()


async def settled(service: WorkerService) -> Scheduler:
    """The scheduler, once nothing is active any more and all it held is back."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(TIMEOUT):
        while True:
            seen: asyncio.Future[tuple[Scheduler, bool]] = loop.create_future()

            def look(scheduler: Scheduler, seen: asyncio.Future[Any] = seen) -> None:
                busy = bool(scheduler.active) or scheduler.has_work
                loop.call_soon_threadsafe(seen.set_result, (scheduler, busy))

            service.hub.engine.inspect(look)
            scheduler, busy = await seen
            if not busy:
                scheduler.check_integrity()
                return scheduler
