"""What the HTTP edge adds to the time to the first token and to the cost of a token.

One mesh; each pair runs the same prompts once over gRPC, once over HTTP, `concurrency` of them at
once, in an order that alternates. Pairs are short and many, so that a change in the machine's speed
meets both sides, and what is added is the median over pairs, with a bootstrap interval. Both ask
for text alone, and both clocks stop at the first of it. The clients are as light as each protocol
allows, on connections that stay open: grpc.aio, and a reader of bare HTTP/1.1. They share the cores
with the mesh, so what each costs is shown beside the mesh's own processes: the HTTP client is the
cheaper one, and that difference is no merit of the edge.
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

from kvmesh.integration.estimate import Estimate, median_of, percent_more
from kvmesh.integration.launch import running_mesh
from kvmesh.integration.launch_plan import GATEWAY
from kvmesh.integration.loadgen import RequestResult, closed_loop, greedy, token_request
from kvmesh.integration.machine import cpu_seconds
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import MeshConfig
from kvmesh.services.common.percentile import percentile
from kvmesh.services.router.client import InferenceClient

READY_S = 120.0
REQUEST_S = 60.0
LAST_CHUNK = b"0\r\n\r\n"
TAIL_BYTES = 1024  # of an answer that are kept: the usage is in its last event
WARM_UP_PAIRS = 3
USAGE = re.compile(rb'"completion_tokens":(\d+)')


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class EdgePlan:
    """`requests` over each side for each concurrency, in pairs of `concurrency` at once."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 128
    output_tokens: int = 64
    requests: int = 256
    seed: int = 1

    def pairs(self, concurrency: int) -> int:
        return max(1, self.requests // concurrency)


@dataclass(frozen=True, slots=True)
class EdgeSide:
    """TTFT over all requests. token_us: wall-clock per output token, of the median round.

    mesh_us, client_us: CPU per output token of all of the mesh's processes, and of the client;
    mesh_us is None where the system does not say.
    """

    ttft_p50_ms: float
    ttft_p99_ms: float
    token_us: float
    mesh_us: float | None
    client_us: float


@dataclass(frozen=True, slots=True)
class EdgeRow:
    """added_*: HTTP minus gRPC, median over pairs: of TTFT medians, of the wall-clock of a token,
    and of the CPU that the mesh spends on one. edge_us: CPU per token of the edge's own process.
    """

    concurrency: int
    pairs: int
    grpc: EdgeSide
    http: EdgeSide
    added_ttft_ms: Estimate
    added_token_percent: Estimate
    added_cpu_percent: Estimate | None
    edge_us: float | None


async def bench_edge(
    config: MeshConfig, plan: EdgePlan, run_dir: Path, on_pair: Callable[[], None]
) -> list[EdgeRow]:
    """Starts a mesh with an edge and measures both ways into it."""
    async with running_mesh(config, run_dir) as mesh:
        await mesh.wait_ready(READY_S)
        async with Link(mesh.public_address, mesh.security) as link:
            client = InferenceClient(link)
            bench = _Bench(plan, client, mesh.http_url, config.model.name)
            bench.pids = mesh.pids
            bench.vocab = (await client.list_models()).models[0].vocab_size
            try:
                for number in range(WARM_UP_PAIRS):
                    for way in (bench.over_grpc, bench.over_http):
                        await way(max(plan.concurrency), f"warm-up {number}")
                return [await bench.row(concurrency, on_pair) for concurrency in plan.concurrency]
            finally:
                bench.close()


@dataclass(frozen=True, slots=True)
class _Round:
    """Seconds per token on the wall, and of CPU: the client's, the mesh's, the edge's."""

    ttft_s: list[float]
    token_s: float
    client_s: float
    mesh_s: float | None
    edge_s: float | None


class _Bench:
    def __init__(self, plan: EdgePlan, client: InferenceClient, url: str, model: str) -> None:
        self.vocab = 0
        self.pids: dict[str, int] = {}
        self._plan = plan
        self._client = client
        self._model = model
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._connections: list[_Connection] = []

    def close(self) -> None:
        for _, writer in self._connections:
            writer.close()
        self._connections.clear()

    async def row(self, concurrency: int, on_pair: Callable[[], None]) -> EdgeRow:
        self.close()  # the edge may have closed those that waited for long
        direct: list[_Round] = []
        http: list[_Round] = []
        for number in range(self._plan.pairs(concurrency)):
            ways = [(self.over_grpc, direct), (self.over_http, http)]
            for way, rounds in ways if number % 2 == 0 else reversed(ways):
                rounds.append(await way(concurrency, f"{concurrency}/{number}"))
            on_pair()
        return _row(concurrency, direct, http)

    async def over_grpc(self, concurrency: int, salt: str) -> _Round:
        sampling = greedy(self._plan.output_tokens)
        prompts = self._prompts(concurrency, salt)
        requests = [token_request(ids, sampling, f"grpc {salt}") for ids in prompts]
        for request in requests:
            request.echo_token_ids = False
        with _Watch(self.pids) as watch:
            results = await closed_loop(self._client, requests, concurrency)
        return self._done(results, watch)

    async def over_http(self, concurrency: int, salt: str) -> _Round:
        bodies = [self._body(ids, f"http {salt}") for ids in self._prompts(concurrency, salt)]
        while len(self._connections) < concurrency:
            self._connections.append(await asyncio.open_connection(self._host, self._port))
        with _Watch(self.pids) as watch:
            async with asyncio.timeout(REQUEST_S):
                results = await asyncio.gather(
                    *(
                        _request(*connection, body)
                        for connection, body in zip(self._connections, bodies, strict=False)
                    )
                )
        return self._done(results, watch)

    def _prompts(self, count: int, salt: str) -> list[list[int]]:
        """The same on both sides; the salts of their caches differ, so that each computes them."""
        rng = random.Random(f"{self._plan.seed}/{salt}")
        length = self._plan.prompt_tokens
        return [[rng.randrange(self.vocab) for _ in range(length)] for _ in range(count)]

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
        if tokens != len(results) * self._plan.output_tokens:
            raise RuntimeError(f"{tokens} tokens came of {len(results)} requests")
        cpu_s = {name: s / tokens for name, s in watch.cpu_s.items() if s is not None}
        return _Round(
            ttft_s=[result.ttft_s for result in results],
            token_s=watch.wall_s / tokens,
            client_s=watch.client_s / tokens,
            mesh_s=sum(cpu_s.values()) if len(cpu_s) == len(self.pids) else None,
            edge_s=cpu_s.get(GATEWAY),
        )


class _Watch:
    """What a block took: seconds on the wall, and of CPU here and in the processes `pids`."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.wall_s = self.client_s = 0.0
        self.cpu_s: dict[str, float | None] = {}

    def __enter__(self) -> Self:
        self._cpu = {name: cpu_seconds(pid) for name, pid in self._pids.items()}
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall_s, client_s = self._begin
        self.wall_s = time.perf_counter() - wall_s
        self.client_s = time.process_time() - client_s
        for name, before in self._cpu.items():
            now = cpu_seconds(self._pids[name])
            self.cpu_s[name] = None if before is None or now is None else now - before


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


def _row(concurrency: int, direct: Sequence[_Round], http: Sequence[_Round]) -> EdgeRow:
    """direct, http: the two sides of each pair."""
    pairs = list(zip(direct, http, strict=True))
    ttft = [statistics.median(h.ttft_s) - statistics.median(d.ttft_s) for d, h in pairs]
    cpu = [(d.mesh_s, h.mesh_s) for d, h in pairs if d.mesh_s is not None and h.mesh_s is not None]
    edge = [one.edge_s for one in http if one.edge_s is not None]
    return EdgeRow(
        concurrency=concurrency,
        pairs=len(pairs),
        grpc=_side(direct),
        http=_side(http),
        added_ttft_ms=median_of([1e3 * seconds for seconds in ttft]),
        added_token_percent=median_of([100 * (h.token_s / d.token_s - 1) for d, h in pairs]),
        added_cpu_percent=percent_more(*zip(*cpu, strict=True)) if cpu else None,
        edge_us=round(1e6 * statistics.mean(edge), 1) if edge else None,
    )


def _side(rounds: Sequence[_Round]) -> EdgeSide:
    ttft = sorted(seconds for one in rounds for seconds in one.ttft_s)
    mesh = [one.mesh_s for one in rounds if one.mesh_s is not None]
    return EdgeSide(
        ttft_p50_ms=round(1e3 * statistics.median(ttft), 3),
        ttft_p99_ms=round(1e3 * percentile(ttft, 0.99), 3),
        token_us=round(1e6 * statistics.median(one.token_s for one in rounds), 1),
        mesh_us=round(1e6 * statistics.mean(mesh), 1) if mesh else None,
        client_us=round(1e6 * statistics.mean(one.client_s for one in rounds), 1),
    )
