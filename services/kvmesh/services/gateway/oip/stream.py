"""One ModelStreamInfer call: its requests run side by side, each response as it comes."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from kvmesh.oip import inference_pb2 as pb
from kvmesh.services.common.errors import MeshError

MAX_RUNNING = 64  # of one stream; no more are read until one has ended
MAX_QUEUED = 64  # responses that the client has not taken yet

Emit = Callable[[pb.ModelInferResponse], Awaitable[None]]
Infer = Callable[[pb.ModelInferRequest, Emit], Awaitable[None]]


class InferStream:
    """infer: runs one request and emits its responses; may raise MeshError.

    strict: the first error ends the stream with its status; else it is a response, and the others
    go on.
    """

    def __init__(self, infer: Infer, strict: bool) -> None:
        self._infer = infer
        self._strict = strict
        self._slots = asyncio.Semaphore(MAX_RUNNING)
        self._queue: asyncio.Queue[pb.ModelStreamInferResponse | Exception | None] = asyncio.Queue(
            MAX_QUEUED
        )

    async def responses(
        self, requests: AsyncIterator[pb.ModelInferRequest]
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """Ends when `requests` has, and all that it gave. Closing it cancels what runs."""
        reader = asyncio.create_task(self._read(requests))
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        async with asyncio.TaskGroup() as group:
            try:
                async for request in requests:
                    await self._slots.acquire()
                    group.create_task(self._run(request))
            except MeshError as error:
                await self._queue.put(error)
        await self._queue.put(None)

    async def _emit(self, response: pb.ModelInferResponse) -> None:
        await self._queue.put(pb.ModelStreamInferResponse(infer_response=response))

    async def _run(self, request: pb.ModelInferRequest) -> None:
        try:
            await self._infer(request, self._emit)
        except MeshError as error:
            await self._queue.put(error if self._strict else _failed(request, error))
        except Exception as error:  # a bug: the server answers INTERNAL and logs it
            await self._queue.put(error)
        finally:
            self._slots.release()


def _failed(request: pb.ModelInferRequest, error: MeshError) -> pb.ModelStreamInferResponse:
    """The status has no field of its own here, so it is a parameter."""
    made = pb.ModelStreamInferResponse(error_message=str(error) or error.code.name)
    made.infer_response.model_name = request.model_name
    made.infer_response.id = request.id
    made.infer_response.parameters["grpc_status"].string_param = error.code.name
    made.infer_response.parameters["triton_final_response"].bool_param = True
    return made
