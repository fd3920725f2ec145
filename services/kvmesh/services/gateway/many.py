"""The edge's way to the router: all its requests on one stream, a step's tokens in one message.

A stream for each request costs the edge, and the router, a read and a write per token and request;
they were most of what the edge added. The price is that a client that does not read no longer
holds up the router: what was generated for it waits here, no longer than its output may be.
"""

import asyncio
import contextlib
import copy
import itertools
from collections.abc import AsyncIterator
from typing import Self

import grpc

from kvmesh.services.common.callers import authorization
from kvmesh.services.common.client import Link
from kvmesh.services.common.errors import MeshError, Unavailable, from_rpc, from_status
from kvmesh.services.common.telemetry import inject
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import common_pb2, inference_pb2_grpc
from kvmesh.v1 import inference_pb2 as pb

Answer = pb.GenerateResponse | MeshError


class ManyStream:
    """Opened by the first request, and again by the next one after it broke."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._stub = inference_pb2_grpc.InferenceStub(link.channel)
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Queue[Answer]] = {}
        self._waiting: list[pb.GenerateItem] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self, item: pb.GenerateItem) -> "asyncio.Queue[Answer]":
        """Sends a request under an id of its own, which `item` gets, and returns its answers."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="requests")
        item.id = next(self._ids)
        answers = self._open[item.id] = asyncio.Queue()
        self._send(item)
        return answers

    def end(self, item_id: int) -> None:
        """Nothing more is wanted of it."""
        if self._open.pop(item_id, None) is not None:
            self._send(pb.GenerateItem(id=item_id, cancel=True))

    async def close(self) -> None:
        """What still runs is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _send(self, item: pb.GenerateItem) -> None:
        self._waiting.append(item)
        self._wake.set()

    async def _run(self) -> None:
        """One life of the stream. All its requests end with it."""
        call = self._stub.GenerateMany(metadata=self._link.metadata())
        writer = asyncio.create_task(self._write(call))
        error: MeshError = Unavailable(f"{self._link.address}: the router ended the stream")
        try:
            async for batch in call:
                for said in batch.items:
                    self._hear(said)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc(failure, self._link.address)
        finally:
            call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._waiting.clear()
            lost, self._open = self._open, {}
            for answers in lost.values():
                answers.put_nowait(copy.copy(error))

    async def _write(
        self, call: "grpc.aio.StreamStreamCall[pb.GenerateBatch, pb.SaidBatch]"
    ) -> None:
        # A stream that broke says so where it is read.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._wake.wait()
                self._wake.clear()
                items, self._waiting = self._waiting, []
                if items:
                    await call.write(pb.GenerateBatch(items=items))

    def _hear(self, said: pb.SaidItem) -> None:
        answers = self._open.get(said.id)
        if answers is None:
            return
        if said.HasField("error"):
            error = said.error
            answers.put_nowait(
                from_status(error.code, error.message, error.retry_after_ms, error.reason)
            )
        else:
            answers.put_nowait(said.response)
        if said.HasField("error") or said.response.finish_reason:
            del self._open[said.id]


class EdgeMesh:
    """The mesh as the edge's endpoints use it. Raises what the router answered with."""

    def __init__(self, client: InferenceClient, stream: ManyStream) -> None:
        self._client = client
        self._stream = stream

    def on_behalf(self, authorization: str) -> Self:
        """The same, as the caller who sent this."""
        other = copy.copy(self)
        other._client = self._client.on_behalf(authorization)
        return other

    async def list_models(self) -> pb.ListModelsResponse:
        return await self._client.list_models()

    async def generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        """Streams the answer; closing the iterator cancels the request in the whole mesh."""
        trace = dict(inject())
        item = pb.GenerateItem(
            request=request,
            authorization=authorization(self._client.metadata()),
            trace=common_pb2.TraceContext(
                traceparent=trace.get("traceparent", ""), tracestate=trace.get("tracestate", "")
            ),
        )
        answers = self._stream.begin(item)
        try:
            while True:
                answer = await answers.get()
                if isinstance(answer, MeshError):
                    raise answer
                yield answer
                if answer.finish_reason:
                    return
        finally:
            self._stream.end(item.id)
