"""kvmesh.v1.Worker over a hub. Only translates."""

import asyncio
import zlib
from collections.abc import AsyncIterator
from typing import Any

from kvmesh.backends.base import DeviceInfo
from kvmesh.services.common.errors import NotFound, Unavailable
from kvmesh.services.worker.hub import Hub
from kvmesh.services.worker.messages import block_format, model_info
from kvmesh.services.worker.session import Session
from kvmesh.v1 import worker_pb2, worker_pb2_grpc


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Answers Unavailable until `serve`. probed: set once a token came out of the engine."""

    def __init__(self, member_id: str, role: str) -> None:
        self._member_id = member_id
        self._role = role
        self._opened: tuple[Hub, DeviceInfo] | None = None
        self.probed = False

    def serve(self, hub: Hub, device: DeviceInfo) -> None:
        self._opened = (hub, device)

    @property
    def _hub(self) -> Hub:
        return self._ready()[0]

    def _ready(self) -> tuple[Hub, DeviceInfo]:
        if self._opened is None:
            raise Unavailable(f"{self._member_id} is still starting; its model is not open yet")
        return self._opened

    async def Attach(
        self, request_iterator: AsyncIterator[worker_pb2.RouterMessage], context: Any
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        hub = self._hub
        session = hub.open()
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            model = model_info(hub.spec, hub.limits.max_tokens)
            hello = worker_pb2.Hello(member_id=self._member_id, model=model)
            yield session.outbox.hello(hello)
            while (message := await session.outbox.next()) is not None:
                if not message.HasField("load"):
                    message.load.CopyFrom(self._hub.load_report())
                yield message
            if reader.done():
                reader.result()  # raises what was wrong with the router's messages
        finally:
            self._hub.close_session(session)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(
        self, session: Session, messages: AsyncIterator[worker_pb2.RouterMessage]
    ) -> None:
        try:
            async for message in messages:
                for submit in message.submit:
                    self._hub.submit(session, submit)
                for cancel in message.cancel:
                    self._hub.cancel(session, cancel.request_id)
        finally:
            session.outbox.close()

    async def FetchTail(
        self, request: worker_pb2.FetchTailRequest, context: Any
    ) -> worker_pb2.FetchTailResponse:
        tail = self._hub.take_tail(request.request_id)
        if tail is None:
            raise NotFound(f"no tail of request {request.request_id!r} is kept here (any more)")
        return worker_pb2.FetchTailResponse(
            format=block_format(self._hub.spec.layout),
            start=tail.start,
            num_tokens=tail.num_tokens,
            data=tail.data,
            crc32=zlib.crc32(tail.data),
        )

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: Any
    ) -> worker_pb2.DescribeResponse:
        hub, device = self._ready()
        return worker_pb2.DescribeResponse(
            member_id=self._member_id,
            role=self._role,
            model=model_info(hub.spec, hub.limits.max_tokens),
            load=hub.load_report(),
            device=device.name,
            simulated=device.simulated,
            probed=self.probed,
        )
