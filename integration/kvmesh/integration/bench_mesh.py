"""Tokens per second and TTFT through the whole mesh, beside the bare engine in the same run.

Rounds of both sides alternate, so a change in the machine's speed meets both; what is reported is
the median over rounds. While one side runs the other is idle, but its processes stay.
"""

import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kvmesh.integration.bare import READ_RESULT, READ_ROUND, Round, RoundResult
from kvmesh.integration.launch import running_mesh
from kvmesh.integration.launch_child import child_environment
from kvmesh.integration.loadgen import closed_loop, greedy, token_request
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import MeshConfig
from kvmesh.services.common.percentile import percentile
from kvmesh.services.router.client import InferenceClient

READY_S = 120.0
ROUND_S = 300.0


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """Each round runs `requests_per_client` requests for every one that is in flight."""

    concurrency: tuple[int, ...] = (1, 4, 16, 64)
    prompt_tokens: int = 128
    output_tokens: int = 64
    requests_per_client: int = 4
    rounds: int = 3
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Side:
    """Medians over rounds; TTFT percentiles over all requests of all rounds."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float


@dataclass(frozen=True, slots=True)
class BenchRow:
    """overhead_us: wall-clock microseconds that the mesh adds to each output token."""

    concurrency: int
    mesh: Side
    bare: Side
    ratio: float  # median over rounds of mesh tokens/s : bare tokens/s
    overhead_us: float


async def bench_mesh(
    config: MeshConfig, plan: BenchPlan, run_dir: Path, on_round: Callable[[], None]
) -> list[BenchRow]:
    """Starts a mesh, and a bare engine of its first worker; measures both at each concurrency."""
    async with running_mesh(config, run_dir) as mesh, _bare(config, run_dir) as bare:
        await mesh.wait_ready(READY_S)
        async with Link(mesh.public_address, mesh.security) as link:
            client = InferenceClient(link)
            vocab = (await client.list_models()).models[0].vocab_size
            await _mesh_round(client, _round(plan, 4, "warm-up", vocab))
            await bare.run(_round(plan, 4, "warm-up", vocab))
            rows = []
            for concurrency in plan.concurrency:
                pairs = []
                for number in range(plan.rounds):
                    asked = _round(plan, concurrency, f"{concurrency}/{number}", vocab)
                    pairs.append((await _mesh_round(client, asked), await bare.run(asked)))
                    on_round()
                rows.append(_row(concurrency, pairs))
            return rows


def _round(plan: BenchPlan, concurrency: int, salt: str, vocab: int) -> Round:
    rng = random.Random(f"{plan.seed}/{salt}")
    count = max(4, concurrency * plan.requests_per_client)
    prompts = [[rng.randrange(vocab) for _ in range(plan.prompt_tokens)] for _ in range(count)]
    return Round(prompts, plan.output_tokens, concurrency, salt)


async def _mesh_round(client: InferenceClient, asked: Round) -> RoundResult:
    sampling = greedy(asked.output_tokens)
    requests = [token_request(prompt, sampling, asked.salt) for prompt in asked.prompts]
    begin = time.perf_counter()
    results = await closed_loop(client, requests, asked.concurrency)
    seconds = time.perf_counter() - begin
    failed = [result.error for result in results if result.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(results)} requests failed: {failed[0]}")
    return RoundResult(
        seconds,
        sum(result.usage.completion_tokens for result in results),
        [result.ttft_s for result in results],
        [result.duration_s for result in results],
    )


class _Bare:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(self, asked: Round) -> RoundResult:
        assert self._process.stdin is not None
        self._process.stdin.write(READ_ROUND.dump_json(asked) + b"\n")
        return READ_RESULT.validate_json(await self.line())

    async def line(self) -> bytes:
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), ROUND_S)
        if not line:
            raise RuntimeError("the bare engine ended; its error is above")
        return line


@asynccontextmanager
async def _bare(config: MeshConfig, run_dir: Path) -> AsyncIterator[_Bare]:
    file = run_dir / "bare.json"
    file.write_text(config.model_dump_json())
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kvmesh.integration.bare",
        str(file),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 26,
        env=child_environment({}),
    )
    try:
        bare = _Bare(process)
        await bare.line()
        yield bare
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def _row(concurrency: int, pairs: list[tuple[RoundResult, RoundResult]]) -> BenchRow:
    mesh, bare = _side([m for m, _ in pairs]), _side([b for _, b in pairs])
    ratio = statistics.median(_speed(m) / _speed(b) for m, b in pairs)
    overhead = statistics.median(1 / _speed(m) - 1 / _speed(b) for m, b in pairs)
    return BenchRow(concurrency, mesh, bare, round(ratio, 4), round(overhead * 1e6, 1))


def _side(rounds: list[RoundResult]) -> Side:
    ttft = sorted(seconds for result in rounds for seconds in result.ttft_s)
    return Side(
        tokens_per_s=round(statistics.median(map(_speed, rounds)), 1),
        ttft_p50_s=round(percentile(ttft, 0.50), 5),
        ttft_p99_s=round(percentile(ttft, 0.99), 5),
    )


def _speed(result: RoundResult) -> float:
    return result.output_tokens / result.seconds
