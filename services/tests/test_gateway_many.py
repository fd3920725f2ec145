"""The edge's one stream to a real router: its requests are as apart as on streams of their own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from router_fakes import FakeTokenizer, FakeWorker, MeshOfFakes, mesh_of, tokens, until

from kvmesh.services.common.api_keys import add_key
from kvmesh.services.common.callers import Callers
from kvmesh.services.common.errors import (
    ContextExceeded,
    InvalidRequest,
    MeshError,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from kvmesh.services.common.key_file import KeyFile, changing
from kvmesh.services.gateway.many import EdgeMesh, ManyStream
from kvmesh.services.router.many import MAX_UNREAD, ManySession
from kvmesh.v1 import inference_pb2

WAIT_S = 10.0


@asynccontextmanager
async def edge_on(
    *fakes: FakeWorker | FakeTokenizer, **router: int
) -> AsyncIterator[tuple[MeshOfFakes, EdgeMesh]]:
    async with mesh_of(*fakes, **router) as mesh:
        stream = ManyStream(mesh.link)
        try:
            yield mesh, EdgeMesh(mesh.client, stream)
        finally:
            await stream.close()


def prompt(number: int) -> list[int]:
    return [(number * 37 + place) % 90 + 5 for place in range(70 + number)]


async def ids_of(edge: EdgeMesh, request: inference_pb2.GenerateRequest) -> list[int]:
    found: list[int] = []
    async with asyncio.timeout(WAIT_S):
        async for response in edge.generate(request):
            found += response.token_ids
    assert response.finish_reason and response.usage.completion_tokens == len(found)
    return found


async def test_many_requests_say_what_each_says_alone() -> None:
    async with edge_on(FakeWorker("worker-0"), FakeTokenizer()) as (mesh, edge):
        alone = []
        for number in range(20):
            heard = [r async for r in mesh.client.generate(tokens(prompt(number), 9 + number))]
            alone.append([token for response in heard for token in response.token_ids])
        requests = [tokens(prompt(number), 9 + number) for number in range(20)]
        together = await asyncio.gather(*(ids_of(edge, request) for request in requests))
        assert list(together) == alone
        assert mesh.service.parts.admission.active == 0


async def test_an_error_is_one_requests_own() -> None:
    worker = FakeWorker("worker-0")
    async with edge_on(worker, FakeTokenizer(), max_active=2) as (mesh, edge):
        worker.pause_after = 2
        running = edge.generate(tokens(prompt(0), 5))
        first = await anext(running)
        wrong: list[tuple[inference_pb2.GenerateRequest, type[MeshError], str]] = [
            (tokens([], 5), InvalidRequest, "empty"),
            (tokens([5] * 100_000, 5), ContextExceeded, "context"),
            (tokens(prompt(1), 5, temperature=-1.0), InvalidRequest, "temperature"),
        ]
        for request, kind, message in wrong:
            with pytest.raises(kind, match=message):
                await ids_of(edge, request)
        second = edge.generate(tokens(prompt(2), 5))
        await anext(second)
        with pytest.raises(Overloaded) as full:
            await ids_of(edge, tokens(prompt(3), 5))
        assert full.value.retry_after_s > 0
        worker.resume.set()
        rest = [response async for response in running]
        assert len(first.token_ids) + sum(len(r.token_ids) for r in rest) == 5
        await second.aclose()
        await until(lambda: mesh.service.parts.admission.active == 0, "all places are free")


async def test_who_goes_away_cancels_its_own() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 2
    async with edge_on(worker, FakeTokenizer()) as (mesh, edge):
        stays, goes = edge.generate(tokens(prompt(0), 6)), edge.generate(tokens(prompt(1), 6))
        await anext(stays)
        await anext(goes)
        await goes.aclose()
        cancelled = await asyncio.wait_for(worker.cancels.get(), WAIT_S)
        assert cancelled == worker.submits[1].request_id
        worker.resume.set()
        rest = [response async for response in stays]
        assert rest[-1].finish_reason
        assert mesh.service.parts.admission.active == 0


async def test_a_stream_that_ends_cancels_and_the_next_request_opens_another() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 2
    async with edge_on(worker, FakeTokenizer()) as (mesh, edge):
        lost = [edge.generate(tokens(prompt(number), 6)) for number in range(2)]
        for stream in lost:
            await anext(stream)
        call = edge._stream._task
        assert call is not None
        call.cancel()
        for stream in lost:
            with pytest.raises(Unavailable):
                async with asyncio.timeout(WAIT_S):
                    _ = [response async for response in stream]
        await until(lambda: mesh.service.parts.admission.active == 0, "both are cancelled")
        worker.resume.set()
        assert len(await ids_of(edge, tokens(prompt(3), 6))) == 6


async def test_a_router_that_goes_away_is_said_at_once() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 2
    async with edge_on(worker, FakeTokenizer()) as (mesh, edge):
        running = edge.generate(tokens(prompt(0), 6))
        await anext(running)
        await mesh.link.close()
        with pytest.raises(MeshError):
            async with asyncio.timeout(WAIT_S):
                _ = [response async for response in running]


async def test_each_request_is_its_callers(tmp_path: Path) -> None:
    with changing(tmp_path / "keys") as held:
        held[0], key = add_key(held[0], "acme", {"concurrency": 1}, 0)
    worker = FakeWorker("worker-0")
    async with edge_on(worker, FakeTokenizer()) as (mesh, edge):
        parts = mesh.service.parts
        parts.callers = Callers("s3cret", KeyFile(tmp_path / "keys"))
        operator, acme = edge.on_behalf("Bearer s3cret"), edge.on_behalf(f"Bearer {key}")
        for stranger in (edge, edge.on_behalf(""), edge.on_behalf("Bearer other")):
            with pytest.raises(Unauthenticated):
                await ids_of(stranger, tokens(prompt(0), 3))
        worker.pause_after = 1
        running = acme.generate(tokens(prompt(1), 3))
        await anext(running)
        with pytest.raises(Overloaded, match="acme"):
            await ids_of(acme, tokens(prompt(2), 3))
        worker.resume.set()
        assert len(await ids_of(operator, tokens(prompt(3), 3))) == 3
        assert [r.finish_reason async for r in running][-1]
        salts = [submit.cache_salt for submit in worker.submits]
        assert salts[0] and salts[0] != salts[1] == ""


async def test_an_edge_that_does_not_listen_is_not_read_from() -> None:
    taken = 0

    async def batches() -> AsyncIterator[inference_pb2.GenerateBatch]:
        nonlocal taken
        while True:
            taken += 1
            items = [inference_pb2.GenerateItem(id=taken * 1000 + n) for n in range(1000)]
            yield inference_pb2.GenerateBatch(items=items)
            await asyncio.sleep(0)  # those before are refused

    parts: Any = SimpleNamespace(callers=Callers("s3cret"))
    session = ManySession(parts, WAIT_S)
    reader = asyncio.create_task(session.read(batches()))
    try:
        seen = -1
        while seen != taken:
            seen = taken
            for _ in range(10):
                await asyncio.sleep(0)
        assert taken <= MAX_UNREAD / 1000 + 2
        batch = await session.next()
        assert batch is not None and len(batch.items) > MAX_UNREAD
        assert {item.error.code for item in batch.items} == {16}
        await until(lambda: taken > seen, "there is room again")
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await session.close()
