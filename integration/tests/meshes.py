"""What the end-to-end tests share: meshes on random ports, prompts, and the requests to compare."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trustme
from tokenizers import Tokenizer

from kvmesh.integration.launch import Mesh, running_mesh
from kvmesh.integration.launch_health import POLL_S
from kvmesh.integration.loadgen import RequestResult, closed_loop, run_request, token_request
from kvmesh.integration.needle import make_case
from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import (
    GatewayConfig,
    MeshConfig,
    ModelConfig,
    RouterConfig,
    SecurityConfig,
    WorkerConfig,
)
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import common_pb2, inference_pb2

SEED = 7
NUM_PROMPTS = 20
OUTPUT_TOKENS = 64


def mesh_config(workers: Sequence[WorkerConfig] = (), **parts: object) -> MeshConfig:
    """A mesh on random ports, without an HTTP edge; defaults where nothing is said."""
    parts.setdefault("gateway", GatewayConfig(enabled=False))
    router = parts.pop("router", RouterConfig(port=0))
    defaults = MeshConfig().workers
    return MeshConfig(router=router, workers=tuple(workers) or defaults, **parts)  # type: ignore[arg-type]


def issue(directory: Path) -> SecurityConfig:
    """An authority, a certificate for loopback, and a token, as files in `directory`."""
    authority = trustme.CA()
    cert = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    cert.private_key_pem.write_to_path(str(directory / "key.pem"))
    cert.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    (directory / "token").write_text("s3cret-token\n")
    return SecurityConfig(
        cert=directory / "cert.pem",
        key=directory / "key.pem",
        ca=directory / "ca.pem",
        token_file=directory / "token",
    )


@asynccontextmanager
async def inference(mesh: Mesh) -> AsyncIterator[InferenceClient]:
    async with Link(mesh.public_address) as link:
        yield InferenceClient(link)


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_path(ModelConfig()) / "tokenizer.json"))


def prompts(count: int = NUM_PROMPTS, seed: int = SEED) -> list[list[int]]:
    """Token prompts of 70 to 450 tokens: below and above a block, never a multiple of one."""
    coder = tokenizer()
    rng = random.Random(seed)
    made = []
    for number in range(count):
        case = make_case(
            seed * 1000 + number, 512, number % 8 + 1, lambda text: len(coder.encode(text).ids)
        )
        ids = coder.encode(case.prompt).ids
        length = rng.randrange(70, 450)
        made.append(ids[: length + (length % 64 == 0)])
    return made


def sampling(number: int, seeded: bool) -> common_pb2.SamplingParams:
    """Greedy, or a temperature high enough that a changed logit would be heard."""
    params = common_pb2.SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, temperature=0.0)
    if seeded:
        params.temperature, params.seed, params.top_p = 1.2, 1000 + number, 0.95
    return params


def identity_requests(salt: str = "") -> list[inference_pb2.GenerateRequest]:
    """NUM_PROMPTS greedy requests, then the same prompts with seeded sampling."""
    return [
        token_request(ids, sampling(number, seeded), salt)
        for seeded in (False, True)
        for number, ids in enumerate(prompts())
    ]


def outputs_of(results: Sequence[RequestResult]) -> list[list[int]]:
    """Output ids of every request; fails if one did not finish."""
    assert [result.error for result in results if result.error] == []
    assert {len(result.token_ids) for result in results} == {OUTPUT_TOKENS}
    return [result.token_ids for result in results]


async def outputs(
    client: InferenceClient, requests: Sequence[inference_pb2.GenerateRequest], concurrency: int
) -> list[list[int]]:
    return outputs_of(await closed_loop(client, requests, concurrency))


async def ready(mesh: Mesh) -> Mesh:
    await mesh.wait_ready()
    return mesh


@asynccontextmanager
async def started(config: MeshConfig, run_dir: Path) -> AsyncIterator[tuple[Mesh, InferenceClient]]:
    """A mesh that is ready, with a client of it."""
    async with running_mesh(config, run_dir) as mesh, inference(await ready(mesh)) as client:
        yield mesh, client


async def incarnation_of(client: InferenceClient, member_id: str) -> int:
    """Which process of a member the router sends requests to; 0 while it sends it none."""
    members = (await client.status()).members
    serving = [m for m in members if m.member_id == member_id and m.state == "serving"]
    return serving[0].incarnation if serving else 0


async def wait_renewed(client: InferenceClient, member_id: str, before: int) -> None:
    """Until the router sends requests to another process of the member: a restarted one is ready
    before the router, which may still believe in the one that died, has come to know it."""
    async with asyncio.timeout(60.0):
        while await incarnation_of(client, member_id) in (0, before):
            await asyncio.sleep(POLL_S)


class Progress:
    """Runs requests and lets a test wait for how far they have come."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_started = 0
        self._changed = asyncio.Event()

    async def wait_for(self, holds: Callable[["Progress"], bool], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not holds(self):
                self._changed.clear()
                await self._changed.wait()

    async def run_all(
        self, client: InferenceClient, requests: Sequence[inference_pb2.GenerateRequest]
    ) -> list[RequestResult]:
        return list(await asyncio.gather(*(run_request(client, r, self.saw) for r in requests)))

    def saw(self, response: inference_pb2.GenerateResponse) -> None:
        self.num_started += bool(response.token_ids)
        self.num_tokens += len(response.token_ids)
        self._changed.set()
