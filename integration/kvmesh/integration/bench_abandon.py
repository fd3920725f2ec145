"""How soon the blocks of abandoned HTTP streams are free, by the workers' own gauges.

Each try opens streams that would run for long, waits until the workers show their blocks, closes
the connections and asks the workers until all blocks are free and nothing runs. A time is at most
one look too long, never too short. Every other try closes while the prompts are still computed.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh.integration.edge_http import Connection, EdgeConnections, completion_body, send
from kvmesh.integration.launch import Mesh
from kvmesh.integration.scrape import scrape
from kvmesh.services.common import metric_names as metric

TRY_S = 60.0
LOOK_S = 0.005  # between two looks: a look takes time of the worker that it looks at
OUTPUT_TOKENS = 4096
DECODING_PROMPT, PREFILLING_PROMPT = 128, 2048
GAUGES = tuple(
    name.replace(".", "_")
    for name in (metric.POOL_BLOCKS, metric.POOL_FREE, metric.WORKER_RUNNING, metric.WORKER_WAITING)
)


@dataclass(frozen=True, slots=True)
class AbandonRow:
    """Milliseconds from the client's close to all blocks being free. streams: closed at once.

    held_blocks: the median of how many were held when the client closed.
    """

    streams: int
    tries: int
    held_blocks: float
    median_ms: float
    largest_ms: float


@dataclass(frozen=True, slots=True)
class _Load:
    blocks: int  # held
    requests: int


async def bench_abandon(
    mesh: Mesh, vocab: int, streams: int, tries: int, on_try: Callable[[], None]
) -> AbandonRow:
    """Raises TimeoutError if blocks stay held, RuntimeError if a worker shows no metrics."""
    bench = _Bench(mesh, vocab)
    held: list[int] = []
    took_s: list[float] = []
    for number in range(tries):
        async with asyncio.timeout(TRY_S):
            blocks, seconds = await bench.once(streams, number)
        held.append(blocks)
        took_s.append(seconds)
        on_try()
    return AbandonRow(
        streams=streams,
        tries=tries,
        held_blocks=statistics.median(held),
        median_ms=round(1e3 * statistics.median(took_s), 1),
        largest_ms=round(1e3 * max(took_s), 1),
    )


class _Bench:
    def __init__(self, mesh: Mesh, vocab: int) -> None:
        self._model = mesh.config.model.name
        self._edge = EdgeConnections(mesh.http_url)
        self._vocab = vocab
        members = mesh.members.values()
        self._workers = {m.plan.member_id: m.metrics for m in members if m.plan.kind == "worker"}

    async def once(self, streams: int, number: int) -> tuple[int, float]:
        """Blocks that were held, and the seconds until none was."""
        await self._until(lambda load: load == _Load(0, 0))
        prefilling = number % 2 == 1
        connections = [await self._edge.connect() for _ in range(streams)]
        try:
            for index, (_, writer) in enumerate(connections):
                send(writer, self._body(f"abandoned {streams}/{number}/{index}", prefilling))
            if not prefilling:
                await asyncio.gather(*(_first_event(one) for one in connections))
            load = await self._until(lambda load: load.blocks > 0 and load.requests == streams)
        finally:
            begin = time.perf_counter()
            for _, writer in connections:
                writer.close()
        await self._until(lambda load: load == _Load(0, 0))
        return load.blocks, time.perf_counter() - begin

    def _body(self, salt: str, prefilling: bool) -> bytes:
        rng = random.Random(salt)
        length = PREFILLING_PROMPT if prefilling else DECODING_PROMPT
        ids = [rng.randrange(self._vocab) for _ in range(length)]
        return completion_body(self._model, ids, salt, OUTPUT_TOKENS)

    async def _until(self, holds: Callable[[_Load], bool]) -> _Load:
        while not holds(load := await self._look()):
            await asyncio.sleep(LOOK_S)
        return load

    async def _look(self) -> _Load:
        found = await scrape(self._workers)
        if len(found) != len(self._workers):
            raise RuntimeError(f"{len(found)} of {len(self._workers)} workers show their metrics")
        total, free, running, waiting = (
            sum(int(one.total(name) or 0) for one in found.values()) for name in GAUGES
        )
        return _Load(total - free, running + waiting)


async def _first_event(connection: Connection) -> None:
    """Raises RuntimeError for an answer that is no stream."""
    head = await connection[0].readuntil(b"\r\n\r\n")
    if b" 200 " not in head[:16]:
        raise RuntimeError(f"the edge answered {head[:40].decode()}")
    await connection[0].readuntil(b"\n\n")
