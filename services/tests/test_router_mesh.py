"""The router over real gRPC, with scripted workers, tokenizers and shards."""

import asyncio
import json
import random

import grpc
import pytest
from router_fakes import (
    FORMAT,
    MODEL,
    VOCAB,
    FakeShard,
    FakeTokenizer,
    FakeWorker,
    Heard,
    expected,
    hear,
    mesh_of,
    text_of,
    tokens,
    until,
)
from span_sink import SpanSink

from kvmesh.services.common.errors import Expired, MeshError, Unavailable, status_number
from kvmesh.services.kvcache.keys import block_keys, root_key
from kvmesh.v1 import common_pb2, inference_pb2, inference_pb2_grpc, mesh_pb2, worker_pb2

LENGTH = common_pb2.FINISH_REASON_LENGTH
STOP = common_pb2.FINISH_REASON_STOP


def prompt(length: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def keys_of(ids: list[int]) -> list[bytes]:
    return block_keys(root_key(FORMAT.fingerprint, FORMAT.codec, 64, ""), ids)


def check(heard: Heard, ids: list[int], count: int) -> None:
    """All tokens, in order, once, and the text that belongs to them; one end, and it is last."""
    want = expected(ids, count)
    assert heard.ids == want
    assert heard.text == text_of(want)
    assert [bool(r.finish_reason) for r in heard.responses].index(True) == len(heard.responses) - 1
    assert heard.last.finish_reason == LENGTH
    assert heard.last.usage.completion_tokens == count
    assert heard.last.usage.prompt_tokens == len(ids)


async def test_a_request_runs_and_is_accounted_for() -> None:
    async with mesh_of(FakeWorker("worker-0"), FakeTokenizer()) as mesh:
        heard = await hear(mesh.client, tokens(prompt(70), 9))
        check(heard, prompt(70), 9)
        usage = heard.last.usage
        assert (usage.decode_worker, usage.prefill_worker) == ("worker-0", "")
        assert (usage.migrations, usage.cached_tokens) == (0, 64)
        assert 0 < usage.ttft_s <= usage.duration_s
        assert usage.seed > 0
        assert heard.responses[0].trace_id == heard.last.trace_id
        assert len(heard.last.trace_id) == 32
        assert len(heard.last.request_id) == 32
        status = await mesh.client.status()
        assert (status.requests_total, status.requests_active) == (1, 0)
        assert [m.member_id for m in status.members] == ["router", "tokenizer", "worker-0"]


async def test_text_and_chat_prompts_are_encoded() -> None:
    worker = FakeWorker("worker-0")
    async with mesh_of(worker, FakeTokenizer()) as mesh:
        chat = inference_pb2.ChatPrompt(
            messages=[inference_pb2.ChatMessage(role="user", content="hallo")]
        )
        limit = common_pb2.SamplingParams(max_tokens=2, seed=5)
        for request in (
            inference_pb2.GenerateRequest(text="hallo", sampling=limit),
            inference_pb2.GenerateRequest(chat=chat, sampling=limit),
        ):
            heard = await hear(mesh.client, request)
            assert heard.text == text_of(expected([ord(c) for c in "hallo"], 2))
            assert heard.ids == []  # not asked for
            assert heard.last.usage.seed == 5
        assert [list(s.token_ids) for s in worker.submits] == [[104, 97, 108, 108, 111]] * 2
        assert worker.submits[0].sampling.seed == 5


async def test_max_tokens_is_what_the_context_leaves() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 1
    async with mesh_of(worker, FakeTokenizer()) as mesh:
        request = tokens(prompt(100), 5)
        request.sampling.ClearField("max_tokens")
        stream = mesh.client.generate(request)
        await anext(stream)
        assert worker.submits[0].sampling.max_tokens == MODEL.max_context - 100
        await stream.aclose()


async def test_long_uncached_prompts_are_handed_over() -> None:
    first, second = FakeWorker("worker-0", "prefill"), FakeWorker("worker-1", "decode")
    ids = prompt(300)
    async with mesh_of(first, second, FakeTokenizer(), FakeShard("kvcache-0")) as mesh:
        heard = await hear(mesh.client, tokens(ids, 6))
        check(heard, ids, 6)
        assert heard.last.usage.prefill_worker == "worker-0"
        assert heard.last.usage.decode_worker == "worker-1"
        assert heard.last.usage.migrations == 0
        (begun,), (gone_on,) = first.submits, second.submits
        assert begun.prefill_only
        assert not gone_on.prefill_only
        assert list(gone_on.token_ids) == ids + expected(ids, 1)
        assert gone_on.num_prompt_tokens == 300
        assert gone_on.tail_address == f"127.0.0.1:{mesh.members['worker-0'].port}"
        assert gone_on.request_id == begun.request_id
        shards = [f"127.0.0.1:{mesh.members['kvcache-0'].port}"]
        assert list(begun.shard_addresses) == list(gone_on.shard_addresses) == shards
        assert begun.sampling.seed == gone_on.sampling.seed == heard.last.usage.seed
        assert second.cancels.empty()


@pytest.mark.parametrize(("length", "cached"), [(200, 0), (300, 4)])
async def test_short_or_cached_prompts_are_not_handed_over(length: int, cached: int) -> None:
    first, second = FakeWorker("worker-0", "prefill"), FakeWorker("worker-1", "decode")
    ids = prompt(length)
    shard = FakeShard("kvcache-0", keys_of(ids)[:cached])
    async with mesh_of(first, second, FakeTokenizer(), shard) as mesh:
        index = mesh.service.parts.core.index
        await until(lambda: index.blocks_of("kvcache-0") == cached, "the snapshot is in the index")
        check(await hear(mesh.client, tokens(ids, 3)), ids, 3)
        assert not first.submits
        assert len(second.submits) == 1
        explained = await mesh.client.route(tokens(ids, 3))
        assert [c.decode_worker for c in explained.candidates if c.chosen] == ["worker-1"]
        assert any("hand-over from 256" in c.rejected for c in explained.candidates)


async def test_a_prefill_worker_that_fails_leaves_it_to_the_decode_worker() -> None:
    first, second = FakeWorker("worker-0", "prefill"), FakeWorker("worker-1", "decode")
    broken = common_pb2.RequestError(code=status_number(MeshError("")), message="scripted")
    first.answer = lambda _: worker_pb2.TokenUpdate(
        finish_reason=common_pb2.FINISH_REASON_ERROR, error=broken
    )
    ids = prompt(300)
    async with mesh_of(first, second, FakeTokenizer()) as mesh:
        heard = await hear(mesh.client, tokens(ids, 6))
        check(heard, ids, 6)
        assert heard.last.usage.decode_worker == "worker-1"
        assert second.submits[0].tail_address == ""
        assert list(second.submits[0].token_ids) == ids


async def test_a_prefill_worker_that_dies_after_its_token_loses_nothing() -> None:
    first, second = FakeWorker("worker-0", "prefill"), FakeWorker("worker-1", "decode")
    ids = prompt(300)
    token = expected(ids, 1)
    first.answer = lambda _: worker_pb2.TokenUpdate(token_ids=token)  # and no HANDOVER
    async with mesh_of(first, second, FakeTokenizer()) as mesh:
        running = asyncio.create_task(hear(mesh.client, tokens(ids, 6)))
        await until(lambda: bool(first.submits), "prefill began")
        await mesh.kill("worker-0")
        heard = await running
        check(heard, ids, 6)
        assert heard.last.usage.migrations == 1
        assert second.submits[0].tail_address == ""


async def test_lost_worker_migrates_without_loss_or_repetition() -> None:
    workers = [FakeWorker("worker-0"), FakeWorker("worker-1")]
    for worker in workers:
        worker.pause_after = 5
    async with mesh_of(*workers, FakeTokenizer()) as mesh:
        prompts = [prompt(70, seed) for seed in range(8)]
        running = [asyncio.create_task(hear(mesh.client, tokens(p, 12))) for p in prompts]
        await until(lambda: sum(len(w.submits) for w in workers) == 8, "all are placed")
        assert all(w.submits for w in workers), "both got a share"
        moved = len(workers[0].submits)
        workers[1].resume.set()
        await mesh.kill("worker-0")
        heard = await asyncio.gather(*running)
        for ids, one in zip(prompts, heard, strict=True):
            check(one, ids, 12)
            assert one.last.usage.decode_worker == "worker-1"
        assert sum(one.last.usage.migrations for one in heard) == moved
        assert (await mesh.client.status()).migrations_total == moved


async def test_last_worker_lost_is_waited_for() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 3
    async with mesh_of(worker, FakeTokenizer()) as mesh:
        running = asyncio.create_task(hear(mesh.client, tokens(prompt(70), 8)))
        await until(lambda: bool(worker.submits), "it runs")
        port = (await mesh.kill("worker-0")).port
        again = FakeWorker("worker-0")
        await mesh.join(again, port)
        heard = await running
        check(heard, prompt(70), 8)
        assert heard.last.usage.migrations == 1


async def test_too_many_migrations_end_the_request() -> None:
    workers = [FakeWorker("worker-0"), FakeWorker("worker-1")]
    for worker in workers:
        worker.pause_after = 1
    async with mesh_of(*workers, FakeTokenizer(), max_migrations=1) as mesh:
        running = asyncio.create_task(hear(mesh.client, tokens(prompt(70), 8)))
        for _ in range(2):
            await until(lambda: any(w.submits for w in workers), "it runs")
            (now,) = (w for w in workers if w.submits)
            now.submits = []
            await mesh.kill(now.member_id)
        with pytest.raises(Unavailable, match="after 1 migrations"):
            await running


async def test_a_full_worker_is_avoided_and_a_lone_one_answers_for_itself() -> None:
    full, free = FakeWorker("worker-0"), FakeWorker("worker-1")
    error = common_pb2.RequestError(code=8, message="queue holds 2 of 2", retry_after_ms=250)
    full.answer = lambda _: worker_pb2.TokenUpdate(
        finish_reason=common_pb2.FINISH_REASON_ERROR, error=error
    )
    free.load.pending_prefill_tokens = 5000  # so that the full one is chosen first
    async with mesh_of(full, free, FakeTokenizer()) as mesh:
        heard = await hear(mesh.client, tokens(prompt(70), 4))
        check(heard, prompt(70), 4)
        assert (len(full.submits), len(free.submits)) == (1, 1)
        assert heard.last.usage.migrations == 0
        await mesh.kill("worker-1")
        await until(lambda: not mesh.service.parts.core.workers.get("worker-1").connected, "gone")  # type: ignore[union-attr]
        status, trailers = await refusal(mesh.link.channel, tokens(prompt(70), 4))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailers["retry-after-ms"] == "250"


async def test_cancel_reaches_the_worker_and_frees_the_place() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 2
    tokenizer = FakeTokenizer()
    async with mesh_of(worker, tokenizer) as mesh:
        stream = mesh.client.generate(tokens(prompt(70), 500))
        await anext(stream)
        await stream.aclose()
        cancelled = await asyncio.wait_for(worker.cancels.get(), 1.0)
        assert cancelled == worker.submits[0].request_id
        parts = mesh.service.parts
        await until(lambda: parts.admission.active == 0, "the place is free")
        await until(lambda: not tokenizer.open, "the tokenizer forgot it")
        assert parts.core.workers.get("worker-0").sent == {}  # type: ignore[union-attr]


async def test_the_deadline_ends_it_everywhere() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 2
    async with mesh_of(worker, FakeTokenizer(), request_timeout_s=0.3) as mesh:
        with pytest.raises(Expired, match=r"0\.300 s"):
            await hear(mesh.client, tokens(prompt(70), 500))
        assert await asyncio.wait_for(worker.cancels.get(), 1.0)
        assert 0 < worker.submits[0].deadline_ms <= 300


async def test_a_stop_string_ends_it_and_cancels_the_worker() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 9
    ids = prompt(70)
    want = expected(ids, 9)
    async with mesh_of(worker, FakeTokenizer()) as mesh:
        heard = await hear(mesh.client, tokens(ids, 500, stop=[f"{want[6]}é"]))
        assert heard.last.finish_reason == STOP
        assert heard.text == text_of(want[:6])
        assert heard.ids == want[:7]
        assert heard.last.usage.completion_tokens == 7
        assert await asyncio.wait_for(worker.cancels.get(), 1.0) == worker.submits[0].request_id


async def refusal(
    channel: grpc.aio.Channel, request: inference_pb2.GenerateRequest
) -> tuple[grpc.StatusCode, dict[str, str | bytes]]:
    stub = inference_pb2_grpc.InferenceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request, timeout=10):
            pass
    trailers = dict(caught.value.trailing_metadata() or ())
    return caught.value.code(), {**trailers, "details": caught.value.details() or ""}


async def test_queue_limits_answer_with_a_retry_delay() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 1
    async with mesh_of(worker, FakeTokenizer(), max_active=2, max_waiting_s=5.0) as mesh:
        streams = [mesh.client.generate(tokens(prompt(70), 9)) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        status, trailers = await refusal(mesh.link.channel, tokens(prompt(70), 9))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 requests are active, at most 2" in str(trailers["details"])
        assert int(trailers["retry-after-ms"]) > 0
        for stream in streams:
            await stream.aclose()
        await until(lambda: mesh.service.parts.admission.active == 0, "both are over")
        worker.out.put_nowait(
            worker_pb2.WorkerMessage(
                load=worker_pb2.LoadReport(
                    pending_prefill_tokens=1000,
                    estimate=worker_pb2.Estimate(base_s=0.0, prefill_token_s=0.01),
                )
            )
        )
        state = mesh.service.parts.core.workers.get("worker-0")
        assert state is not None
        await until(lambda: state.report.pending_prefill_tokens == 1000, "the report came")
        status, trailers = await refusal(mesh.link.channel, tokens(prompt(70), 9))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "predicted wait is 10.0 s, at most 5 s" in str(trailers["details"])
        assert trailers["retry-after-ms"] == "5000"
        assert (await mesh.client.status()).rejected_total == 2


BAD = [
    (inference_pb2.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "no prompt"),
    (inference_pb2.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "text prompt is"),
    (tokens([], 1), grpc.StatusCode.INVALID_ARGUMENT, "tokens prompt is empty"),
    (
        inference_pb2.GenerateRequest(chat=inference_pb2.ChatPrompt()),
        grpc.StatusCode.INVALID_ARGUMENT,
        "chat prompt is empty",
    ),
    (
        inference_pb2.GenerateRequest(text="a", model="other"),
        grpc.StatusCode.NOT_FOUND,
        "no model 'other'; this mesh has: mini",
    ),
    (tokens([1, 1000], 1), grpc.StatusCode.INVALID_ARGUMENT, "id 1000 is outside the vocabulary"),
    (tokens([1] * 2048, 1), grpc.StatusCode.INVALID_ARGUMENT, "2048 tokens, the context has 2048"),
    (tokens([1], 0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens is 0"),
    (tokens([1], 1, temperature=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "temperature is -1"),
    (
        inference_pb2.GenerateRequest(text="a", cache_salt="x" * 257),
        grpc.StatusCode.INVALID_ARGUMENT,
        "cache_salt has 257 bytes",
    ),
    (
        inference_pb2.GenerateRequest(text="a", request_id="é" * 65),
        grpc.StatusCode.INVALID_ARGUMENT,
        "request_id has 130 bytes",
    ),
]


async def test_bad_input_is_named_and_reaches_no_worker() -> None:
    worker = FakeWorker("worker-0")
    async with mesh_of(worker, FakeTokenizer()) as mesh:
        for request, code, words in BAD:
            status, trailers = await refusal(mesh.link.channel, request)
            assert status is code, request
            assert words in str(trailers["details"])
        assert not worker.submits
        assert mesh.service.parts.admission.active == 0


async def test_nothing_is_served_before_a_worker_came() -> None:
    async with mesh_of(FakeTokenizer()) as mesh:
        status, _ = await refusal(mesh.link.channel, tokens([1], 1))
        assert status is grpc.StatusCode.UNAVAILABLE
        assert list((await mesh.client.list_models()).models) == []


async def test_two_requests_may_have_one_id() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 2
    async with mesh_of(worker, FakeTokenizer()) as mesh:
        requests = [tokens(prompt(70, seed), 6) for seed in (1, 2)]
        for request in requests:
            request.request_id = "same"
        running = [asyncio.create_task(hear(mesh.client, request)) for request in requests]
        await until(lambda: len(worker.submits) == 2, "both run")
        worker.resume.set()
        for seed, heard in zip((1, 2), await asyncio.gather(*running), strict=True):
            check(heard, prompt(70, seed), 6)
            assert heard.last.request_id == "same"


async def test_the_worker_that_holds_the_prefix_is_chosen() -> None:
    ids = prompt(400)
    workers = [FakeWorker(f"worker-{n}") for n in range(3)]
    workers[2].held = keys_of(ids)[:5]
    async with mesh_of(*workers, FakeTokenizer()) as mesh:
        check(await hear(mesh.client, tokens(ids, 2)), ids, 2)
        assert [len(w.submits) for w in workers] == [0, 0, 1]
        explained = await mesh.client.route(tokens(ids, 2))
        best = explained.candidates[0]
        assert (best.decode_worker, best.local_cached_tokens, best.chosen) == (
            "worker-2",
            384,  # 5 blocks that it reported, and one more that the request just brought there
            True,
        )
        assert (explained.prompt_tokens, explained.prompt_blocks) == (400, 6)


async def test_a_restarted_workers_entries_vanish() -> None:
    ids = prompt(400)
    worker = FakeWorker("worker-0")
    worker.held = keys_of(ids)
    async with mesh_of(worker, FakeTokenizer()) as mesh:
        before = await mesh.client.route(tokens(ids, 2))
        assert before.candidates[0].local_cached_tokens == 384
        port = (await mesh.kill("worker-0")).port
        await mesh.join(FakeWorker("worker-0"), port)
        after = await mesh.client.route(tokens(ids, 2))
        assert after.candidates[0].local_cached_tokens == 0
        members = {m.member_id: m for m in (await mesh.client.status()).members}
        assert members["worker-0"].indexed_blocks == 0


async def test_a_new_life_beside_the_old_stream_keeps_its_own_entries() -> None:
    ids = prompt(400)
    old, new = FakeWorker("worker-0"), FakeWorker("worker-0")
    old.pause_after = 3
    new.held = keys_of(ids)[:2]
    async with mesh_of(old, FakeTokenizer()) as mesh:
        running = asyncio.create_task(hear(mesh.client, tokens(prompt(70), 8)))
        await until(lambda: bool(old.submits), "it runs")
        server = mesh.members["worker-0"].server
        await mesh.join(new)  # the old process hangs: its stream is still open
        heard = await running
        check(heard, prompt(70), 8)
        assert heard.last.usage.migrations == 1
        index = mesh.service.parts.core.index
        await until(lambda: index.blocks_of("worker-0") == 2, "the new life's snapshot is in")
        await server.stop(0)


async def test_siblings_of_one_burst_follow_the_first() -> None:
    workers = [FakeWorker(f"worker-{n}") for n in range(3)]
    for worker in workers:
        worker.pause_after = 1
        worker.load.estimate.CopyFrom(
            worker_pb2.Estimate(base_s=1e-4, prefill_token_s=1e-2, decode_token_s=1e-5)
        )
    shared = prompt(640)
    async with mesh_of(*workers, FakeTokenizer()) as mesh:
        streams = []
        for seed in range(4):
            streams.append(mesh.client.generate(tokens(shared + prompt(8, seed), 9)))
            await anext(streams[-1])
        assert sorted(len(w.submits) for w in workers) == [0, 0, 4]
        for stream in streams:
            await stream.aclose()


async def test_a_gap_in_a_shards_events_brings_a_new_snapshot() -> None:
    shard = FakeShard("kvcache-0", [bytes([n] * 16) for n in range(3)])
    async with mesh_of(shard) as mesh:
        index = mesh.service.parts.core.index
        await until(lambda: index.blocks_of("kvcache-0") == 3, "the snapshot is in")
        shard.held.append(bytes([9] * 16))
        shard.out.put_nowait(
            common_pb2.BlockEvents(incarnation=shard.incarnation, sequence=3, stored=[bytes(16)])
        )
        await until(lambda: index.blocks_of("kvcache-0") == 4, "the second snapshot is in")
        assert shard.watches == 2


async def test_a_gap_in_a_workers_events_costs_no_request() -> None:
    worker = FakeWorker("worker-0")
    worker.pause_after = 2
    worker.held = [bytes([n] * 16) for n in range(3)]
    async with mesh_of(worker, FakeTokenizer()) as mesh:
        index = mesh.service.parts.core.index
        running = asyncio.create_task(hear(mesh.client, tokens(prompt(70), 6)))
        await until(lambda: bool(worker.submits), "it runs")
        worker.out.put_nowait(worker_pb2.WorkerMessage(events=worker.events(9)))
        await until(lambda: index.blocks_of("worker-0") == 0, "nothing is known of it")
        worker.resume.set()
        heard = await running
        check(heard, prompt(70), 6)
        assert heard.last.usage.migrations == 0
        worker.out.put_nowait(worker_pb2.WorkerMessage(load=worker.load))
        await until(lambda: index.blocks_of("worker-0") == 3, "the new snapshot is in")
        assert worker.attached == 2


async def test_a_tokenizer_that_dies_repeats_nothing() -> None:
    worker, tokenizer = FakeWorker("worker-0"), FakeTokenizer()
    tokenizer.break_after = 3
    async with mesh_of(worker, tokenizer) as mesh:
        prompts = [prompt(70, seed) for seed in range(4)]
        heard = await asyncio.gather(*(hear(mesh.client, tokens(p, 40)) for p in prompts))
        for ids, one in zip(prompts, heard, strict=True):
            check(one, ids, 40)
        assert tokenizer.streams == 2


async def test_a_replaced_tokenizer_repeats_nothing() -> None:
    worker, tokenizer = FakeWorker("worker-0"), FakeTokenizer()
    worker.pause_after = 5
    async with mesh_of(worker, tokenizer) as mesh:
        stream = mesh.client.generate(tokens(prompt(70), 12))
        responses = [await anext(stream)]
        port = (await mesh.kill("tokenizer")).port
        await mesh.join(FakeTokenizer(), port)
        worker.resume.set()
        responses += [response async for response in stream]
        text = "".join(response.text for response in responses)
        check(Heard(text, [i for r in responses for i in r.token_ids], responses), prompt(70), 12)


async def test_members_are_told_apart_and_refused() -> None:
    async with mesh_of(FakeWorker("worker-0"), FakeTokenizer()) as mesh:
        other = mesh_pb2.Member(
            member_id="worker-9", incarnation=1, kind="worker", role="both", address="127.0.0.1:1"
        )
        other.model.CopyFrom(MODEL)
        other.model.format.codec = "k4v4"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.stub.Register(mesh_pb2.RegisterRequest(member=other), timeout=5)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.stub.Renew(
                mesh_pb2.RenewRequest(member_id="worker-0", incarnation=1), timeout=5
            )
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        listed = await mesh.stub.ListMembers(mesh_pb2.ListMembersRequest(kind="worker"), timeout=5)
        assert [m.member_id for m in listed.members] == ["worker-0"]


async def test_a_draining_worker_gets_nothing_new() -> None:
    first, second = FakeWorker("worker-0"), FakeWorker("worker-1")
    async with mesh_of(first, second, FakeTokenizer()) as mesh:
        await mesh.stub.Renew(
            mesh_pb2.RenewRequest(
                member_id="worker-0", incarnation=first.incarnation, draining=True
            ),
            timeout=5,
        )
        for seed in range(6):
            check(await hear(mesh.client, tokens(prompt(70, seed), 2)), prompt(70, seed), 2)
        assert (len(first.submits), len(second.submits)) == (0, 6)


async def test_a_lease_that_runs_out_ends_membership() -> None:
    async with mesh_of(FakeWorker("worker-0"), FakeTokenizer(), lease_s=0.4) as mesh:
        await until(lambda: not mesh.service.parts.fleet.membership.leases(), "all are gone")
        status, _ = await refusal(mesh.link.channel, tokens([1], 1))
        assert status is grpc.StatusCode.UNAVAILABLE


async def test_one_trace_tells_the_whole_request() -> None:
    sink = SpanSink()
    first, second = FakeWorker("worker-0", "prefill"), FakeWorker("worker-1", "decode")
    ids = prompt(300)
    async with mesh_of(first, second, FakeTokenizer(), spans=sink) as mesh:
        heard = await hear(mesh.client, tokens(ids, 6))
    spans = {span["name"]: span for span in sink.records}
    root = spans["chat mini"]
    assert set(spans) == {"chat mini", "tokenize", "route", "hand-over", "detokenize"}
    assert {span["trace_id"] for span in spans.values()} == {heard.last.trace_id}
    for name in set(spans) - {"chat mini"}:
        assert spans[name]["parent_id"] == root["span_id"]
    for submit in (*first.submits, *second.submits):
        assert submit.trace.traceparent.split("-")[1:3] == [root["trace_id"], root["span_id"]]
    found = root["attributes"]
    assert found["gen_ai.usage.input_tokens"] == 300
    assert found["gen_ai.usage.output_tokens"] == 6
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    candidates = json.loads(spans["route"]["attributes"]["kvmesh.route.candidates"])
    assert [(c["prefill"], c["decode"]) for c in candidates if "rejected" not in c] == [
        ("worker-0", "worker-1")
    ]
    assert spans["route"]["attributes"]["kvmesh.route.predicted_s"] > 0
