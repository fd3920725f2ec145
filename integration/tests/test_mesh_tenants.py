"""Tenants of a whole mesh: keys, limits, and caches that do not show in each other's TTFT."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from meshes import mesh_config, prompts

from kvmesh.client import Client
from kvmesh.client.retry import NO_RETRY
from kvmesh.integration.launch import Mesh, running_mesh
from kvmesh.integration.launch_state import traces_path
from kvmesh.integration.loadgen import RequestResult, run_request, token_request
from kvmesh.integration.scrape import scrape
from kvmesh.services.common.api_keys import KeyTable, add_key, key_id, revoke_key
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import GatewayConfig, SecurityConfig, WorkerConfig
from kvmesh.services.common.errors import Forbidden, Overloaded, Unauthenticated
from kvmesh.services.common.key_file import changing, read_document
from kvmesh.services.common.security import Security
from kvmesh.services.router.client import InferenceClient
from kvmesh.services.traces.query import Filter
from kvmesh.services.traces.reader import SpanReader
from kvmesh.v1 import common_pb2

TOKEN = "s3cret-token-of-the-operator"
GREEDY = common_pb2.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = max(prompts(), key=len)
TEXT = "The lighthouse of Velmora " * 20


@dataclass
class Tenants:
    """A mesh with a key file. keys: by tenant."""

    mesh: Mesh
    file: Path
    keys: dict[str, str]

    @asynccontextmanager
    async def grpc(self, who: str) -> AsyncIterator[InferenceClient]:
        token = TOKEN if who == "operator" else self.keys.get(who, who)
        async with Link(self.mesh.public_address, Security(token=token)) as link:
            yield InferenceClient(link)

    @asynccontextmanager
    async def http(self, who: str) -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(
            base_url=f"{self.mesh.http_url}/v1", api_key=self.keys.get(who, who), max_retries=0
        ) as client:
            yield client

    async def ask(self, who: str, salt: str = "") -> RequestResult:
        async with self.grpc(who) as client:
            result = await run_request(client, token_request(PROMPT, GREEDY, salt))
        assert result.error == ""
        return result

    async def cached_over_http(self, who: str, salt: str = "") -> int:
        async with self.http(who) as client:
            extra = {"cache_salt": salt} if salt else {}
            answer = await client.completions.create(
                model="mini", prompt=PROMPT, max_tokens=2, temperature=0, extra_body=extra
            )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    async def until_known(self, key: str, known: bool) -> None:
        """Until both doors have read the file again."""
        async with asyncio.timeout(30.0):
            for door in (self._grpc_knows, self._http_knows):
                while await door(key) is not known:
                    await asyncio.sleep(0.05)

    async def _grpc_knows(self, key: str) -> bool:
        async with self.grpc(key) as client:
            try:
                await client.list_models()
            except Unauthenticated:
                return False
        return True

    async def _http_knows(self, key: str) -> bool:
        async with self.http(key) as client:
            try:
                await client.models.list()
            except openai.AuthenticationError:
                return False
        return True


@asynccontextmanager
async def tenants_mesh(directory: Path) -> AsyncIterator[Tenants]:
    (directory / "token").write_text(TOKEN)
    keys: dict[str, str] = {}
    limits = {
        "acme": {}, "beta": {}, "rate": {"requests_per_minute": 1},
        "words": {"tokens_per_minute": 600}, "single": {"concurrency": 1},
    }  # fmt: skip
    with changing(directory / "keys.json") as held:
        for name, allowed in limits.items():
            held[0], keys[name] = add_key(held[0], name, allowed, 0)
    config = mesh_config(
        [WorkerConfig(role="both")],
        gateway=GatewayConfig(port=0),
        security=SecurityConfig(token_file=directory / "token", keys_file=directory / "keys.json"),
    )
    async with running_mesh(config, directory / "run") as mesh:
        await mesh.wait_ready()
        yield Tenants(mesh, directory / "keys.json", keys)


async def test_tenants_of_a_mesh(tmp_path: Path) -> None:
    async with tenants_mesh(tmp_path) as tenants:
        await caches_are_apart(tenants)
        await only_who_is_known_comes_in(tenants)
        await limits_hold_over_both_doors(tenants)
        await keys_come_and_go(tenants)
        await shown_by_name(tenants)
        secrets = [*tenants.keys.values(), TOKEN, read_document(tenants.file).secret]
    with SpanReader(traces_path(tmp_path / "run")) as reader:
        listed = reader.newest(Filter(tenant="acme"), 100)
        assert listed and {trace.tenant for trace in listed} == {"acme"}
        assert reader.newest(Filter(tenant="beta"), 1)
    stores = [*(tmp_path / "run").glob("traces.sqlite*"), *(tmp_path / "run" / "logs").iterdir()]
    for path in (*stores, tmp_path / "run"):
        if path.is_file():
            kept = path.read_bytes()
            assert not any(secret.encode() in kept for secret in secrets)
            assert b"lighthouse" not in kept


async def caches_are_apart(tenants: Tenants) -> None:
    first = await tenants.ask("acme")
    again = await tenants.ask("acme")
    assert first.usage.cached_tokens == 0 and again.usage.cached_tokens >= 64
    foreign = await tenants.ask("beta")
    assert foreign.usage.cached_tokens == 0
    assert first.token_ids == again.token_ids == foreign.token_ids
    # Whoever knew another's salt could not use it, and the operator's requests are apart, too.
    acme = KeyTable(read_document(tenants.file)).find(tenants.keys["acme"])
    assert acme is not None
    async with tenants.grpc("rate") as client:
        request = token_request(PROMPT, GREEDY, acme.salt(""))
        routed = await client.route(request)
        assert all(c.local_cached_tokens + c.remote_cached_tokens == 0 for c in routed.candidates)
    assert (await tenants.ask("beta", acme.salt(""))).usage.cached_tokens == 0
    assert (await tenants.ask("operator")).usage.cached_tokens == 0
    # Over HTTP it is the same tenant, and its own salts part it further.
    assert await tenants.cached_over_http("acme") >= 64
    assert await tenants.cached_over_http("acme", "part") == 0
    assert await tenants.cached_over_http("single") == 0
    assert await tenants.cached_over_http("single", acme.salt("")) == 0


async def only_who_is_known_comes_in(tenants: Tenants) -> None:
    for stranger in ("", "any", tenants.keys["acme"][:-1]):
        assert not await tenants._grpc_knows(stranger)
    for stranger in ("any", tenants.keys["acme"][:-1]):
        async with tenants.http(stranger) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.completions.create(model="mini", prompt=TEXT)
            assert caught.value.code == "invalid_api_key"
    async with tenants.grpc("acme") as client:
        with pytest.raises(Forbidden, match="operator"):
            await client.status()
    async with tenants.grpc("operator") as client:
        assert {m.kind for m in (await client.status()).members} >= {"router", "gateway"}


async def limits_hold_over_both_doors(tenants: Tenants) -> None:
    """What one door took counts at the other."""
    await tenants.ask("rate")
    async with tenants.http("rate") as client:
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model="mini", prompt=TEXT, max_tokens=1)
        assert full.value.code == "rate_limit_exceeded"
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
    direct = Client(tenants.mesh.public_address, Security(token=tenants.keys["rate"]), NO_RETRY)
    with direct, pytest.raises(Overloaded, match="1 requests per minute") as caught:
        await asyncio.to_thread(direct.generate, token_request(PROMPT, GREEDY))
    assert 0 < caught.value.retry_after_s <= 60

    async with tenants.http("words") as client:
        await client.completions.create(model="mini", prompt=PROMPT, max_tokens=20)
        with pytest.raises(openai.RateLimitError, match="600 tokens per minute"):
            await client.completions.create(model="mini", prompt=PROMPT, max_tokens=400)

    async with tenants.http("single") as client:
        stream = await client.completions.create(
            model="mini", prompt=TEXT, max_tokens=5000, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        with pytest.raises(openai.RateLimitError, match="1 requests at once"):
            await client.completions.create(model="mini", prompt=TEXT, max_tokens=1)
        # Not even one of another place in the same trace.
        header = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(
                model="mini", prompt=TEXT, max_tokens=1, extra_headers=header
            )
        await stream.close()


async def keys_come_and_go(tenants: Tenants) -> None:
    with changing(tenants.file) as held:
        held[0], late = add_key(held[0], "late", {}, 0)
    await tenants.until_known(late, True)
    tenants.keys["late"] = late
    assert (await tenants.ask("late")).usage.cached_tokens == 0
    with changing(tenants.file) as held:
        held[0] = revoke_key(held[0], key_id(late), 1)
    await tenants.until_known(late, False)
    assert await tenants._grpc_knows(tenants.keys["acme"])


async def shown_by_name(tenants: Tenants) -> None:
    members = tenants.mesh.members
    shown = await scrape({name: members[name].metrics for name in ("router", "gateway")})
    router, gateway = shown["router"], shown["gateway"]
    acme = {"kvmesh_tenant": "acme"}
    assert router.total("kvmesh_tenant_requests_total", **acme) == 4
    assert router.total("kvmesh_tenant_tokens_total", **acme) == 4 * len(PROMPT) + 8 + 8 + 2 + 2
    refused = "kvmesh_tenant_requests_refused_total"
    assert router.total(refused, kvmesh_tenant="rate", kvmesh_tenant_limit="requests") == 2
    assert router.total(refused, **acme) is None
    count = "http_server_request_duration_seconds_count"
    assert gateway.total(count, http_response_status_code="429")
    assert gateway.total(count, http_response_status_code="401")
    assert gateway.total("kvmesh_keys_failures_total") == 0
