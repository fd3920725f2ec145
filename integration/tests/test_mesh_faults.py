"""What goes wrong in a running mesh, and what its users see of it."""

import asyncio
import os
import signal
from pathlib import Path

import grpc
import pytest
from meshes import (
    Progress,
    incarnation_of,
    inference,
    mesh_config,
    prompts,
    ready,
    started,
    wait_renewed,
)

from kvmesh.integration.launch import LaunchOptions, Mesh, running_mesh
from kvmesh.integration.launch_health import POLL_S
from kvmesh.integration.loadgen import run_request, token_request
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import KvCacheConfig, RouterConfig, WorkerConfig
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import common_pb2, inference_pb2, inference_pb2_grpc, kvcache_pb2, kvcache_pb2_grpc

GREEDY = common_pb2.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


async def held_keys(stub: kvcache_pb2_grpc.KvCacheStub) -> list[bytes]:
    async for events in stub.Watch(kvcache_pb2.WatchRequest(), timeout=10):
        return list(events.stored)
    return []


async def test_a_flipped_byte_in_a_shard_changes_no_answer(tmp_path: Path) -> None:
    config = mesh_config(
        [WorkerConfig(role="both")], kvcache=KvCacheConfig(shards=1), router=RouterConfig(port=0)
    )
    options = LaunchOptions(environment={"KVMESH_FAULTS": "1"})
    request = token_request(max(prompts(), key=len), GREEDY)
    full_blocks = len(request.tokens.ids) // 64
    assert full_blocks
    async with running_mesh(config, tmp_path, options) as mesh:
        await ready(mesh)
        shard = mesh.members["kvcache-0"].addresses[0]
        async with Link(shard) as link, inference(mesh) as client:
            stub = kvcache_pb2_grpc.KvCacheStub(link.channel)
            before = await run_request(client, request)
            # The worker puts blocks while it answers, and may end after that.
            async with asyncio.timeout(60.0):
                while len(keys := await held_keys(stub)) < full_blocks:
                    await asyncio.sleep(POLL_S)
            first = await incarnation_of(client, "worker-0")
            # A worker that starts anew has nothing of its own and must ask the shard.
            mesh.kill("worker-0", signal.SIGKILL)
            await wait_renewed(client, "worker-0", first)
            for key in keys:
                await stub.Corrupt(kvcache_pb2.CorruptRequest(key=key, offset=1000), timeout=5)
            after = await run_request(client, request)
            stats = await stub.Stats(kvcache_pb2.KvStatsRequest(), timeout=5)
    assert not before.error
    assert not after.error
    assert after.token_ids == before.token_ids
    assert stats.checksum_failures > 0
    assert after.usage.cached_tokens == 0


async def test_fault_injection_needs_the_switch(tmp_path: Path) -> None:
    config = mesh_config([WorkerConfig(role="both")], kvcache=KvCacheConfig(shards=1))
    async with running_mesh(config, tmp_path) as mesh:
        await mesh.wait_ready()
        async with Link(mesh.members["kvcache-0"].addresses[0]) as link:
            stub = kvcache_pb2_grpc.KvCacheStub(link.channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Corrupt(kvcache_pb2.CorruptRequest(key=bytes(16)), timeout=5)
    assert caught.value.code() in (
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
    )


async def blocks_free(client: InferenceClient) -> dict[str, tuple[int, int, int]]:
    """Of each worker: free blocks, running and waiting sequences."""
    status = await client.status()
    return {
        m.member_id: (m.blocks_free, m.running, m.waiting)
        for m in status.members
        if m.kind == "worker"
    }


async def test_cancel_frees_everything(tmp_path: Path) -> None:
    endless = common_pb2.SamplingParams(temperature=0.0, max_tokens=7000, ignore_eos=True)
    async with (
        running_mesh(mesh_config(), tmp_path) as mesh,
        inference(await ready(mesh)) as client,
    ):
        idle = await blocks_free(client)
        progress = Progress()
        requests = [token_request(ids, endless) for ids in prompts()]
        running = asyncio.create_task(progress.run_all(client, requests))
        await progress.wait_for(lambda p: p.num_tokens > 200)
        assert await blocks_free(client) != idle
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        # It takes less than a second, and an idle worker reports its load once a second; but a
        # test is no stop-watch, and a busy machine may be slow.
        async with asyncio.timeout(20.0):
            while await blocks_free(client) != idle or (await client.status()).requests_active:
                await asyncio.sleep(0.05)


async def test_sigterm_drains_without_a_trace(tmp_path: Path) -> None:
    """A running request ends as finished; no process stays, no log holds a traceback."""
    params = common_pb2.SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    async with (
        running_mesh(mesh_config(), tmp_path) as mesh,
        inference(await ready(mesh)) as client,
    ):
        pids = list(mesh.pids.values())
        progress = Progress()
        running = asyncio.create_task(
            progress.run_all(client, [token_request(prompts()[0], params)])
        )
        await progress.wait_for(lambda p: p.num_tokens > 20)
        await mesh.stop()
        (result,) = await running
        assert result.error == ""
        assert len(result.token_ids) == 400
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for log in (tmp_path / "logs").iterdir():
        assert "Traceback" not in log.read_text(), log.read_text()


BAD: list[tuple[inference_pb2.GenerateRequest, grpc.StatusCode, str]] = [
    (inference_pb2.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
    (inference_pb2.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    (
        inference_pb2.GenerateRequest(text="hi", model="gpt-none"),
        grpc.StatusCode.NOT_FOUND,
        "gpt-none",
    ),
    (
        inference_pb2.GenerateRequest(
            text="hi", sampling=common_pb2.SamplingParams(temperature=-1.0)
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "temperature is -1",
    ),
    (
        inference_pb2.GenerateRequest(text="hi", sampling=common_pb2.SamplingParams(max_tokens=0)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "max_tokens is 0",
    ),
    (
        inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt(ids=[5, 999_999])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "999999",
    ),
    (
        inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt(ids=[5] * 9000)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "9000",
    ),
]


async def expect_alive(mesh: Mesh, client: InferenceClient, pids: dict[str, int]) -> None:
    result = await run_request(client, token_request(prompts()[0], GREEDY))
    assert (result.error, len(result.token_ids)) == ("", 24)
    assert mesh.pids == pids


async def test_bad_input_is_named_and_takes_nothing_down(tmp_path: Path) -> None:
    async with (
        running_mesh(mesh_config(), tmp_path) as mesh,
        inference(await ready(mesh)) as client,
    ):
        pids = dict(mesh.pids)
        async with Link(mesh.public_address) as link:
            stub = inference_pb2_grpc.InferenceStub(link.channel)
            for request, code, words in BAD:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in stub.Generate(request, timeout=20):
                        pass
                assert caught.value.code() is code, (request, caught.value)
                assert words in (caught.value.details() or "")
            raw = link.channel.unary_stream("/kvmesh.v1.Inference/Generate")
            for data, code in (
                (b"\x12\x02\xff\xfe", grpc.StatusCode.INVALID_ARGUMENT),  # text: invalid UTF-8
                (b"\x12\x7f", grpc.StatusCode.INVALID_ARGUMENT),  # cut short
                (bytes(100 << 20), grpc.StatusCode.RESOURCE_EXHAUSTED),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in raw(data, timeout=20):
                        pass
                assert caught.value.code() is code
            unknown_field = token_request(prompts()[0], GREEDY).SerializeToString()
            unknown_field += b"\xfa\x3f\x03abc"
            answer = [r async for r in raw(unknown_field, timeout=20)]
            assert answer
        await expect_alive(mesh, client, pids)


async def test_queue_limit_answers_with_a_retry_delay(tmp_path: Path) -> None:
    endless = common_pb2.SamplingParams(temperature=0.0, max_tokens=5000, ignore_eos=True)
    config = mesh_config(router=RouterConfig(port=0, max_active=4))
    async with started(config, tmp_path) as (mesh, client):
        progress = Progress()
        requests = [token_request(ids, endless) for ids in prompts(4)]
        running = asyncio.create_task(progress.run_all(client, requests))
        await progress.wait_for(lambda p: p.num_tokens > 50)
        async with Link(mesh.public_address) as link:
            stub = inference_pb2_grpc.InferenceStub(link.channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Generate(token_request(prompts()[0], GREEDY), timeout=20):
                    pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(caught.value.trailing_metadata() or ())
        assert int(trailers["retry-after-ms"]) > 0
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
