"""A thin system under test: LoadGen's queries become requests to a mesh, tokens become answers."""

import array
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvmesh.services.common.errors import MeshError
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import inference_pb2

_ITEM_BYTES = 4  # LoadGen counts int32 tokens


@dataclass(frozen=True, slots=True)
class Failed:
    sample: int
    error: str


class MeshSut:
    """Called from LoadGen's threads; everything runs in the event loop that made it.

    requests: one for each sample of the library; a sample that comes again finds nothing cached, as
    MLPerf demands. most: in flight at once, None for no bound; what
    is beyond waits, and its waiting counts.
    """

    def __init__(
        self,
        client: InferenceClient,
        requests: Sequence[inference_pb2.GenerateRequest],
        most: int | None,
        on_done: Callable[[], None],
        loadgen: Any,
    ) -> None:
        self._client = client
        self._requests = requests
        self._places = asyncio.Semaphore(most) if most is not None else None
        self._on_done = on_done
        self._loadgen = loadgen
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.failed: list[Failed] = []
        self.issued: list[tuple[float, int]] = []  # time of the loop, sample

    def issue(self, queries: Sequence[Any]) -> None:
        """LoadGen's callback: must not wait."""
        samples = [(query.id, query.index) for query in queries]
        self._loop.call_soon_threadsafe(self._start, samples)

    def flush(self) -> None:
        """LoadGen waits for the answers itself."""

    def _start(self, samples: list[tuple[int, int]]) -> None:
        now = self._loop.time()
        for query_id, index in samples:
            request = inference_pb2.GenerateRequest()
            request.CopyFrom(self._requests[index])
            request.cache_salt = f"mlperf/{len(self.issued)}/{now}"
            self.issued.append((now, index))
            task = self._loop.create_task(self._answer(query_id, index, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(
        self, query_id: int, index: int, request: inference_pb2.GenerateRequest
    ) -> None:
        if self._places is None:
            await self._run(query_id, index, request)
        else:
            async with self._places:
                await self._run(query_id, index, request)
        self._on_done()

    async def _run(self, query_id: int, index: int, request: inference_pb2.GenerateRequest) -> None:
        """Completes the query in every case: LoadGen knows no failure, and would wait for ever."""
        said: list[int] = []
        try:
            async for response in self._client.generate(request):
                if response.token_ids and not said:
                    self._tell(self._loadgen.FirstTokenComplete, query_id, response.token_ids)
                said.extend(response.token_ids)
        except MeshError as error:
            self.failed.append(Failed(index, f"{type(error).__name__}: {error}"))
        if not said:
            said = [0]
            self._tell(self._loadgen.FirstTokenComplete, query_id, said)
        self._tell(self._loadgen.QuerySamplesComplete, query_id, said, len(said))

    def _tell(
        self, complete: Callable[[list[Any]], None], query_id: int, ids: Sequence[int], *count: int
    ) -> None:
        data = array.array("i", ids)
        address, length = data.buffer_info()
        answer = self._loadgen.QuerySampleResponse(query_id, address, length * _ITEM_BYTES, *count)
        complete([answer])
