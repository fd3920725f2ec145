"""What the HTTP edge adds to the time to the first token and to the cost of a token.

One mesh; each round runs the same load once over gRPC, once over HTTP, in an order that alternates,
so that a change in the machine's speed meets both. Both ask for text alone, and both clocks stop at
the first of it. The clients are as light as each protocol allows: grpc.aio, and a reader of bare
HTTP/1.1 on one kept connection for each request in flight. They share the cores with the mesh, so
what each costs is shown beside the edge's own process: the HTTP client is the cheaper one, and
that difference is no merit of the edge.
"""

import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from kvmesh.integration.launch import running_mesh
from kvmesh.integration.launch_plan import GATEWAY
from kvmesh.integration.loadgen import RequestResult, closed_loop, token_request
from kvmesh.integration.machine import cpu_seconds
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import MeshConfig
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import common_pb2

READY_S = 120.0
REQUEST_S = 60.0
LAST_CHUNK = b"0\r\n\r\n"
TAIL_BYTES = 1024  # of an answer that are kept: the usage is in its last event
USAGE = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(frozen=True, slots=True)
class EdgePlan:
    """Each round runs `requests` requests over each side, `concurrency` of them in flight."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 128
    output_tokens: int = 64
    requests: int = 16
    rounds: int = 9
    seed: int = 1


@dataclass(frozen=True, slots=True)
class EdgeSide:
    """TTFT over all requests of all rounds; token_us: wall-clock per output token, median round.

    client_us: CPU of the client per token, part of token_us as far as the cores are busy.
    """

    ttft_p50_ms: float
    ttft_p99_ms: float
    token_us: float
    client_us: float


@dataclass(frozen=True, slots=True)
class EdgeRow:
    """added_*: HTTP minus gRPC: of TTFT medians and of the cost, the median over pairs of rounds.

    edge_us: CPU of the edge's process per token; None where the system does not say.
    """

    concurrency: int
    grpc: EdgeSide
    http: EdgeSide
    added_ttft_p50_ms: float
    added_token_percent: float
    edge_us: float | None


async def bench_edge(
    config: MeshConfig, plan: EdgePlan, run_dir: Path, on_round: Callable[[], None]
) -> list[EdgeRow]:
    """Starts a mesh with an edge and measures both ways into it."""
    async with running_mesh(config, run_dir) as mesh:
        await mesh.wait_ready(READY_S)
        async with Link(mesh.public_address, mesh.security) as link:
            client = InferenceClient(link)
            bench = _Bench(plan, client, mesh.http_url, config.model.name)
            bench.edge_pid = mesh.pids[GATEWAY]
            bench.vocab = (await client.list_models()).models[0].vocab_size
            for way in (bench.over_grpc, bench.over_http):
                await way(4, "warm-up")
            return [await bench.row(concurrency, on_round) for concurrency in plan.concurrency]


@dataclass(frozen=True, slots=True)
class _Round:
    """cpu_s: of the client and the edge, per token; the edge's is None if unknown."""

    ttft_s: list[float]
    token_s: float
    client_s: float
    edge_s: float | None


class _Bench:
    def __init__(self, plan: EdgePlan, client: InferenceClient, url: str, model: str) -> None:
        self.vocab = 0
        self.edge_pid = 0
        self._plan = plan
        self._client = client
        self._model = model
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80

    async def row(self, concurrency: int, on_round: Callable[[], None]) -> EdgeRow:
        direct: list[_Round] = []
        http: list[_Round] = []
        for number in range(self._plan.rounds):
            ways = [(self.over_grpc, direct), (self.over_http, http)]
            for way, rounds in ways if number % 2 == 0 else reversed(ways):
                rounds.append(await way(concurrency, f"{concurrency}/{number}"))
            on_round()
        added = statistics.median(
            h.token_s / d.token_s - 1 for h, d in zip(http, direct, strict=True)
        )
        sides = _side(direct), _side(http)
        ttft = 1e3 * statistics.median(
            statistics.median(h.ttft_s) - statistics.median(d.ttft_s)
            for h, d in zip(http, direct, strict=True)
        )
        edge = [one.edge_s for one in http if one.edge_s is not None]
        edge_us = round(1e6 * statistics.mean(edge), 1) if edge else None
        return EdgeRow(concurrency, *sides, round(ttft, 3), round(100 * added, 2), edge_us)

    async def over_grpc(self, concurrency: int, salt: str) -> _Round:
        sampling = common_pb2.SamplingParams(
            temperature=0.0, max_tokens=self._plan.output_tokens, ignore_eos=True
        )
        requests = [token_request(ids, sampling, f"grpc {salt}") for ids in self._prompts(salt)]
        for request in requests:
            request.echo_token_ids = False
        with _Watch(self.edge_pid) as watch:
            results = await closed_loop(self._client, requests, concurrency)
        return self._done(results, watch)

    async def over_http(self, concurrency: int, salt: str) -> _Round:
        bodies = [self._body(ids, f"http {salt}") for ids in self._prompts(salt)]
        waiting = iter(bodies)
        results: list[RequestResult] = []

        async def client_loop() -> None:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                for body in waiting:
                    async with asyncio.timeout(REQUEST_S):
                        results.append(await _request(reader, writer, body))
            finally:
                writer.close()

        with _Watch(self.edge_pid) as watch:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(bodies))):
                    group.create_task(client_loop())
        return self._done(results, watch)

    def _prompts(self, salt: str) -> list[list[int]]:
        rng = random.Random(f"{self._plan.seed}/{salt}")
        length = self._plan.prompt_tokens
        return [
            [rng.randrange(self.vocab) for _ in range(length)] for _ in range(self._plan.requests)
        ]

    def _body(self, ids: list[int], salt: str) -> bytes:
        fields = {
            "model": self._model,
            "prompt": ids,
            "max_tokens": self._plan.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": salt,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(fields).encode()

    def _done(self, results: Sequence[RequestResult], watch: "_Watch") -> _Round:
        failed = [result.error for result in results if result.error]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(results)} requests failed: {failed[0]}")
        tokens = sum(result.usage.completion_tokens for result in results)
        if tokens != self._plan.requests * self._plan.output_tokens:
            raise RuntimeError(f"{tokens} tokens came of {len(results)} requests")
        edge_s = None if watch.edge_s is None else watch.edge_s / tokens
        ttft_s = [result.ttft_s for result in results]
        return _Round(ttft_s, watch.wall_s / tokens, watch.client_s / tokens, edge_s)


class _Watch:
    """What a block took: seconds on the wall, and of CPU here and in the process `pid`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.wall_s = self.client_s = 0.0
        self.edge_s: float | None = None

    def __enter__(self) -> Self:
        self._before = time.perf_counter(), time.process_time(), cpu_seconds(self._pid)
        return self

    def __exit__(self, *_: object) -> None:
        wall_s, client_s, edge_s = self._before
        self.wall_s = time.perf_counter() - wall_s
        self.client_s = time.process_time() - client_s
        now_s = cpu_seconds(self._pid)
        self.edge_s = None if edge_s is None or now_s is None else now_s - edge_s


async def _request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> RequestResult:
    """One streamed completion; the connection is ready for the next one after it."""
    result = RequestResult()
    begin = time.perf_counter()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: edge\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    head, data = b"", b""
    while not data.endswith(LAST_CHUNK):
        part = await reader.read(1 << 16)
        if not part:
            result.error = "the edge closed the connection"
            return result
        if not head:
            data += part
            if b"\r\n\r\n" in data:
                head, _, data = data.partition(b"\r\n\r\n")
        else:
            data = (data + part)[-TAIL_BYTES:]
        if head and data and not result.ttft_s:
            result.ttft_s = time.perf_counter() - begin
    result.duration_s = time.perf_counter() - begin
    found = USAGE.search(data)
    if b" 200 " not in head[:16] or found is None:
        result.error = f"{head[:40].decode()}: no usage came"
        return result
    result.usage.completion_tokens = int(found[1])
    return result


def _side(rounds: Sequence[_Round]) -> EdgeSide:
    ttft = sorted(seconds for one in rounds for seconds in one.ttft_s)
    return EdgeSide(
        ttft_p50_ms=round(1e3 * statistics.median(ttft), 3),
        ttft_p99_ms=round(1e3 * ttft[min(len(ttft) - 1, int(0.99 * len(ttft)))], 3),
        token_us=round(1e6 * statistics.median(one.token_s for one in rounds), 1),
        client_us=round(1e6 * statistics.mean(one.client_s for one in rounds), 1),
    )
