"""Calls a worker."""

from collections.abc import AsyncIterator

import grpc

from kvmesh.services.common.client import Deadlines, Link
from kvmesh.services.common.errors import from_rpc
from kvmesh.v1 import worker_pb2, worker_pb2_grpc


class WorkerClient:
    """Does not own `link`. Every call raises the MeshError that the worker answered with."""

    def __init__(self, link: Link, deadlines: Deadlines | None = None) -> None:
        self._link = link
        self._deadlines = deadlines or Deadlines()
        self._stub = worker_pb2_grpc.WorkerStub(link.channel)

    async def attach(
        self, messages: AsyncIterator[worker_pb2.RouterMessage]
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """Opens the long-lived stream; closing the iterator cancels what still runs on it.

        It ends when `messages` ends. It has no deadline of its own: each request on it has one.
        """
        call = self._stub.Attach(messages, metadata=self._link.metadata())
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._link.address) from error
        finally:
            call.cancel()

    async def fetch_tail(self, request_id: str) -> worker_pb2.FetchTailResponse:
        """Raises NotFound if the worker does not keep it (any more)."""
        request = worker_pb2.FetchTailRequest(request_id=request_id)
        try:
            reply: worker_pb2.FetchTailResponse = await self._stub.FetchTail(
                request, timeout=self._deadlines.tail_s, metadata=self._link.metadata()
            )
            return reply
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._link.address) from error

    async def describe(self) -> worker_pb2.DescribeResponse:
        try:
            reply: worker_pb2.DescribeResponse = await self._stub.Describe(
                worker_pb2.DescribeRequest(),
                timeout=self._deadlines.status_s,
                metadata=self._link.metadata(),
            )
            return reply
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._link.address) from error
