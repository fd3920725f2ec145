"""What the HTTP edge adds to the time to the first token and to the cost of a token.

One mesh; each pair runs the same prompts once over gRPC, once over HTTP, `concurrency` of them at
once, in an order that alternates. They begin one after the other, at the same times on both sides:
all at the same moment, most of a TTFT would be the wait for the prompts of others. Pairs are short
and many, so that a change in the machine's speed meets both sides, and what is added is the median
over pairs, with a bootstrap interval. Both ask for text alone, and both clocks stop at the first of
it. The clients are as light as each protocol allows, on connections that stay open: grpc.aio, and a
reader of bare HTTP/1.1. They share the cores with the mesh, so the CPU of a token is shown twice:
of the mesh's own processes, and of mesh and client together, which is what a token costs a machine
that runs both. The HTTP client is the cheaper one.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kvmesh.integration.bench_abandon import AbandonRow, bench_abandon
from kvmesh.integration.edge_http import EdgeConnections, completion_body
from kvmesh.integration.estimate import Estimate, median_of, percent_more
from kvmesh.integration.launch import Mesh, running_mesh
from kvmesh.integration.launch_plan import GATEWAY
from kvmesh.integration.loadgen import RequestResult, greedy, open_loop, token_request
from kvmesh.integration.machine import cpu_seconds
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import MeshConfig
from kvmesh.services.common.percentile import percentile
from kvmesh.services.router.client import InferenceClient

READY_S = 120.0
WARM_UP_PAIRS = 3
GAP_S = 0.03  # between beginnings, plus or minus a half: longer than a prompt takes to compute


@dataclass(frozen=True, slots=True)
class EdgePlan:
    """`requests` over each side for each concurrency, in pairs of `concurrency` at once.

    abandons: how often so many streams are opened and abandoned.
    """

    concurrency: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 128
    output_tokens: int = 64
    requests: int = 256
    abandons: int = 20
    seed: int = 1

    def pairs(self, concurrency: int) -> int:
        return max(1, self.requests // concurrency)

    @property
    def rounds(self) -> int:
        """Pairs and tries, of all concurrencies."""
        return sum(self.pairs(concurrency) + self.abandons for concurrency in self.concurrency)


@dataclass(frozen=True, slots=True)
class EdgeSide:
    """TTFT over all requests. token_us: a request's wall-clock per output token, of the median
    round.

    mesh_us, client_us, all_us: CPU per output token of all of the mesh's processes, of the client,
    and of both; None where the system does not say.
    """

    ttft_p50_ms: float
    ttft_p99_ms: float
    token_us: float
    mesh_us: float | None
    client_us: float
    all_us: float | None


@dataclass(frozen=True, slots=True)
class EdgeRow:
    """added_*: HTTP minus gRPC. Of TTFT medians and of the wall-clock of a token the median over
    pairs; of the CPU of one the mean: the mesh's, and that of mesh and client together.
    edge_us: CPU per token of the edge's own process.
    """

    concurrency: int
    pairs: int
    grpc: EdgeSide
    http: EdgeSide
    added_ttft_ms: Estimate
    added_token_percent: Estimate
    added_mesh_cpu_percent: Estimate | None
    added_all_cpu_percent: Estimate | None
    edge_us: float | None


@dataclass(frozen=True, slots=True)
class EdgeFound:
    rows: list[EdgeRow]
    abandoned: list[AbandonRow]


async def bench_edge(
    config: MeshConfig, plan: EdgePlan, run_dir: Path, on_round: Callable[[], None]
) -> EdgeFound:
    """Starts a mesh with an edge, measures both ways into it, then abandons streams."""
    async with running_mesh(config, run_dir) as mesh:
        await mesh.wait_ready(READY_S)
        async with Link(mesh.public_address, mesh.security) as link:
            client = InferenceClient(link)
            vocab = (await client.list_models()).models[0].vocab_size
            bench = _Bench(plan, client, mesh, vocab)
            try:
                for number in range(WARM_UP_PAIRS):
                    for way in (bench.over_grpc, bench.over_http):
                        await way(max(plan.concurrency), f"warm-up {number}")
                rows = [await bench.row(concurrency, on_round) for concurrency in plan.concurrency]
            finally:
                bench.close()
            abandoned = [
                await bench_abandon(mesh, vocab, streams, plan.abandons, on_round)
                for streams in plan.concurrency
                if plan.abandons
            ]
            return EdgeFound(rows, abandoned)


@dataclass(frozen=True, slots=True)
class _Round:
    """Seconds per token on the wall, and of CPU: the client's, the mesh's, the edge's."""

    ttft_s: list[float]
    token_s: float
    client_s: float
    mesh_s: float | None
    edge_s: float | None

    @property
    def all_s(self) -> float | None:
        return None if self.mesh_s is None else self.mesh_s + self.client_s


class _Bench:
    def __init__(self, plan: EdgePlan, client: InferenceClient, mesh: Mesh, vocab: int) -> None:
        self._plan = plan
        self._client = client
        self._model = mesh.config.model.name
        self._vocab = vocab
        self._pids = mesh.pids
        self._edge = EdgeConnections(mesh.http_url)

    def close(self) -> None:
        self._edge.close()

    async def row(self, concurrency: int, on_round: Callable[[], None]) -> EdgeRow:
        self._edge.close()  # the edge may have closed those that waited for long
        direct: list[_Round] = []
        http: list[_Round] = []
        for number in range(self._plan.pairs(concurrency)):
            ways = [(self.over_grpc, direct), (self.over_http, http)]
            for way, rounds in ways if number % 2 == 0 else reversed(ways):
                rounds.append(await way(concurrency, f"{concurrency}/{number}"))
            on_round()
        return _row(concurrency, direct, http)

    async def over_grpc(self, concurrency: int, salt: str) -> _Round:
        sampling = greedy(self._plan.output_tokens)
        prompts = self._prompts(concurrency, salt)
        requests = [token_request(ids, sampling, f"grpc {salt}") for ids in prompts]
        for request in requests:
            request.echo_token_ids = False
        with _Watch(self._pids) as watch:
            results = await open_loop(self._client, requests, self._arrivals_s(concurrency, salt))
        return self._done(results, watch)

    async def over_http(self, concurrency: int, salt: str) -> _Round:
        bodies = [
            completion_body(self._model, ids, f"http {salt}", self._plan.output_tokens)
            for ids in self._prompts(concurrency, salt)
        ]
        with _Watch(self._pids) as watch:
            results = await self._edge.complete(bodies, self._arrivals_s(concurrency, salt))
        return self._done(results, watch)

    def _prompts(self, count: int, salt: str) -> list[list[int]]:
        """The same on both sides; the salts of their caches differ, so that each computes them."""
        rng = random.Random(f"{self._plan.seed}/{salt}")
        length = self._plan.prompt_tokens
        return [[rng.randrange(self._vocab) for _ in range(length)] for _ in range(count)]

    def _arrivals_s(self, count: int, salt: str) -> list[float]:
        """The same on both sides; the first is at once."""
        rng = random.Random(f"{self._plan.seed}/{salt}/arrivals")
        return [0.0, *((n + rng.uniform(-0.5, 0.5)) * GAP_S for n in range(1, count))]

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
            token_s=sum(result.duration_s for result in results) / tokens,
            client_s=watch.client_s / tokens,
            mesh_s=sum(cpu_s.values()) if len(cpu_s) == len(self._pids) else None,
            edge_s=cpu_s.get(GATEWAY),
        )


class _Watch:
    """What a block took: seconds of CPU here and in the processes `pids`."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.client_s = 0.0
        self.cpu_s: dict[str, float | None] = {}

    def __enter__(self) -> Self:
        self._cpu = {name: cpu_seconds(pid) for name, pid in self._pids.items()}
        self._begin_s = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.client_s = time.process_time() - self._begin_s
        for name, before in self._cpu.items():
            now = cpu_seconds(self._pids[name])
            self.cpu_s[name] = None if before is None or now is None else now - before


def _row(concurrency: int, direct: Sequence[_Round], http: Sequence[_Round]) -> EdgeRow:
    """direct, http: the two sides of each pair."""
    pairs = list(zip(direct, http, strict=True))
    ttft = [statistics.median(h.ttft_s) - statistics.median(d.ttft_s) for d, h in pairs]
    edge = [one.edge_s for one in http if one.edge_s is not None]
    return EdgeRow(
        concurrency=concurrency,
        pairs=len(pairs),
        grpc=_side(direct),
        http=_side(http),
        added_ttft_ms=median_of([1e3 * seconds for seconds in ttft]),
        added_token_percent=median_of([100 * (h.token_s / d.token_s - 1) for d, h in pairs]),
        added_mesh_cpu_percent=_more(pairs, lambda one: one.mesh_s),
        added_all_cpu_percent=_more(pairs, lambda one: one.all_s),
        edge_us=round(1e6 * statistics.mean(edge), 1) if edge else None,
    )


def _more(
    pairs: Sequence[tuple[_Round, _Round]], figure: Callable[[_Round], float | None]
) -> Estimate | None:
    """Percent that the second of a pair has more of; None if nobody says."""
    values = [(figure(d), figure(h)) for d, h in pairs]
    known = [(d, h) for d, h in values if d is not None and h is not None]
    return percent_more(*zip(*known, strict=True)) if known else None


def _side(rounds: Sequence[_Round]) -> EdgeSide:
    ttft = sorted(seconds for one in rounds for seconds in one.ttft_s)
    mesh = [one.mesh_s for one in rounds if one.mesh_s is not None]
    client_s = statistics.mean(one.client_s for one in rounds)
    mesh_s = statistics.mean(mesh) if mesh else None
    return EdgeSide(
        ttft_p50_ms=round(1e3 * statistics.median(ttft), 3),
        ttft_p99_ms=round(1e3 * percentile(ttft, 0.99), 3),
        token_us=round(1e6 * statistics.median(one.token_s for one in rounds), 1),
        mesh_us=None if mesh_s is None else round(1e6 * mesh_s, 1),
        client_us=round(1e6 * client_s, 1),
        all_us=None if mesh_s is None else round(1e6 * (mesh_s + client_s), 1),
    )
