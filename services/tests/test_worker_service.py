"""A worker over real gRPC: what a router sees of it, and what it gives back."""

import asyncio

import grpc
import pytest
from worker_fakes import LAYOUT, FakeModel, continuation
from worker_harness import attached, mesh, settled, shard, worker

from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import MeshConfig, WorkerConfig
from kvmesh.services.common.errors import ConfigError, NotFound, Unavailable
from kvmesh.services.worker.client import WorkerClient
from kvmesh.services.worker.service import worker_config
from kvmesh.v1 import common_pb2

PROMPT = [(5 * i + 3) % 101 for i in range(200)]
FINISHED = (common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH)


async def test_tokens_and_times_of_one_request() -> None:
    async with worker(FakeModel()) as (service, address), attached(address) as router:
        assert router.hello is not None
        assert router.hello.model.format.fingerprint == LAYOUT.fingerprint
        await router.submit("a", PROMPT)
        end = await router.end_of("a")
        assert router.tokens["a"] == continuation(PROMPT, 20)
        assert end.finish_reason in FINISHED
        first = router.updates["a"][0]
        assert first.cached_tokens == 0
        assert first.queue_s >= 0 and first.prefill_s > 0
        await router.until(lambda: len(router.held) == len(PROMPT) // BLOCK_SIZE)
        scheduler = await settled(service)
        assert scheduler.cache.available == 64
        assert router.load.tokens_generated >= len(router.tokens["a"])
        assert router.event_numbers == list(range(1, len(router.event_numbers) + 1))


async def test_many_requests_at_once_say_what_each_says_alone() -> None:
    async with worker(FakeModel(), slots=4, prefill_chunk=48) as (service, address):
        async with attached(address) as router:
            prompts = {f"r{i}": PROMPT[i * 7 : i * 7 + 90] for i in range(12)}
            for name, prompt in prompts.items():
                await router.submit(name, prompt, sampling={"ignore_eos": True})
            for name, prompt in prompts.items():
                await router.end_of(name)
                assert router.tokens[name] == continuation(prompt, 20, eos=None), name
        await settled(service)


async def test_a_repeated_prompt_is_served_from_the_pool() -> None:
    model = FakeModel()
    async with worker(model) as (_, address), attached(address) as router:
        for name in ("a", "b"):
            await router.submit(name, PROMPT)
            await router.end_of(name)
        assert router.tokens["b"] == router.tokens["a"]
        assert router.updates["b"][0].cached_tokens == 3 * BLOCK_SIZE
        assert model.forwards[-len(router.tokens["b"])] == [(192, 8)]


async def test_a_corrupt_local_block_is_computed_again() -> None:
    model = FakeModel()
    async with worker(model) as (service, address), attached(address) as router:
        await router.submit("a", PROMPT)
        await router.end_of("a")
        scheduler = await settled(service)
        used = [i for i in range(64) if i in scheduler.cache._key_of]
        for block in used[1:2]:
            model.pool.blocks[block, LAYOUT.header_bytes + 9] ^= 4
        await router.submit("b", PROMPT)
        await router.end_of("b")
        assert router.tokens["b"] == router.tokens["a"] == continuation(PROMPT, 20)
        assert router.updates["b"][0].cached_tokens < 3 * BLOCK_SIZE
        assert router.load.checksum_failures == 1
        await settled(service)


async def test_preempted_requests_say_the_same() -> None:
    model = FakeModel(num_blocks=7)
    async with worker(model, prefill_chunk=32) as (service, address):
        async with attached(address) as router:
            prompts = {f"r{i}": PROMPT[i * 5 : i * 5 + 100] for i in range(4)}
            wanted = {"max_tokens": 120, "ignore_eos": True}
            for name, prompt in prompts.items():
                await router.submit(name, prompt, sampling=wanted)
            for name, prompt in prompts.items():
                await router.end_of(name)
                assert router.tokens[name] == continuation(prompt, 120, eos=None), name
            assert router.load.preemptions > 0
        await settled(service)


async def test_cancel_frees_blocks_and_slots() -> None:
    async with worker(FakeModel()) as (service, address), attached(address) as router:
        await router.submit("a", PROMPT, sampling={"max_tokens": 1800, "ignore_eos": True})
        await router.until(lambda: len(router.tokens.get("a", [])) > 3)
        await router.cancel("a")
        end = await router.end_of("a")
        assert end.finish_reason == common_pb2.FINISH_REASON_CANCELLED
        scheduler = await settled(service)
        assert scheduler.cache.available == 64


async def test_a_request_cancelled_as_it_comes_still_ends_and_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with worker(FakeModel()) as (service, address), attached(address) as router:
        for i in range(20):
            name = f"r{i}"
            await router.submit(name, PROMPT, cancelled=True, shard_addresses=["127.0.0.1:1"])
            await router.submit(f"beside {name}", PROMPT)
        for i in range(20):
            end = await router.end_of(f"r{i}")
            assert end.finish_reason == common_pb2.FINISH_REASON_CANCELLED
            await router.end_of(f"beside r{i}")
            assert router.tokens[f"beside r{i}"] == continuation(PROMPT, 20)
        await settled(service)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("abruptly", [False, True])
async def test_a_broken_router_stream_frees_all_its_requests(abruptly: bool) -> None:
    async with worker(FakeModel()) as (service, address), attached(address) as router:
        for name in ("a", "b", "c"):
            wanted = {"max_tokens": 1800, "ignore_eos": True}
            await router.submit(name, PROMPT[: 50 + len(name)], sampling=wanted)
        await router.until(lambda: len(router.tokens) == 3)
        await router.close(abruptly)
        scheduler = await settled(service)
        assert scheduler.counters.tokens_generated < 3 * 1800  # they did not just run to their end
        assert scheduler.cache.available == 64
        async with attached(address) as another:
            await another.submit("d", PROMPT)
            await another.end_of("d")
            assert another.tokens["d"] == continuation(PROMPT, 20)


async def test_a_full_queue_refuses() -> None:
    async with worker(FakeModel(), slots=1, max_waiting=1) as (service, address):
        async with attached(address) as router:
            wanted = {"max_tokens": 1800, "ignore_eos": True}
            await router.submit("a", PROMPT, sampling=wanted)
            await router.until(lambda: "a" in router.tokens)
            await router.submit("b", PROMPT, sampling=wanted)
            await router.submit("c", PROMPT)
            end = await router.end_of("c")
            assert end.finish_reason == common_pb2.FINISH_REASON_ERROR
            assert end.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert end.error.retry_after_ms > 0
        await settled(service)


@pytest.mark.parametrize(
    ("tokens", "fields", "said"),
    [
        ([1, 101], {}, "token id 101 is outside the vocabulary of 101"),
        ([], {}, "token_ids is empty"),
        ([1] * 2048, {}, "2048 tokens"),
        ([1] * 700, {}, "700 tokens need 11 blocks, this worker has 8"),
        ([1, 2], {"num_prompt_tokens": 3}, "num_prompt_tokens is 3, must be in 1..2"),
        ([1], {"sampling": {"temperature": -1}}, "temperature is -1"),
        ([1], {"sampling": {"max_tokens": 0}}, "max_tokens is 0"),
        ([1], {"shard_addresses": ["127.0.0.1:1", "unix:/x"]}, "'unix:/x' must be host:port"),
        ([1], {"tail_address": "a"}, "'a' must be host:port"),
    ],
)
async def test_what_can_never_run_is_an_invalid_argument(
    tokens: list[int], fields: dict[str, object], said: str
) -> None:
    async with worker(FakeModel(num_blocks=8)) as (_, address), attached(address) as router:
        await router.submit("bad", tokens, **fields)
        end = await router.end_of("bad")
        assert end.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert said in end.error.message


async def test_a_deadline_ends_a_request() -> None:
    model = FakeModel(num_slots=1)
    async with worker(model) as (service, address), attached(address) as router:
        wanted = {"max_tokens": 1800, "ignore_eos": True}
        await router.submit("a", PROMPT, sampling=wanted, deadline_ms=50)
        end = await router.end_of("a")
        assert end.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        await settled(service)


async def test_a_failing_step_ends_its_requests_and_no_more() -> None:
    model = FakeModel()
    async with worker(model) as (service, address), attached(address) as router:
        model.failing = 1
        await router.submit("a", PROMPT)
        end = await router.end_of("a")
        assert end.error.code == grpc.StatusCode.INTERNAL.value[0]
        assert "fire" not in end.error.message
        await router.submit("b", PROMPT)
        await router.end_of("b")
        assert router.tokens["b"] == continuation(PROMPT, 20)
        await settled(service)


async def test_hand_over_between_two_workers() -> None:
    prefill, decode = FakeModel(), FakeModel()
    async with (
        shard() as (_, shard_address),
        worker(prefill) as (one, one_address),
        worker(decode) as (two, two_address),
        attached(one_address) as first,
        attached(two_address) as second,
    ):
        shards = [shard_address]
        await first.submit("a", PROMPT, prefill_only=True, shard_addresses=shards)
        end = await first.end_of("a")
        assert end.finish_reason == common_pb2.FINISH_REASON_HANDOVER
        said = first.tokens["a"]
        assert said == continuation(PROMPT, 1)
        await second.submit(
            "a", PROMPT + said, num_prompt_tokens=len(PROMPT), tail_address=one_address,
            shard_addresses=shards,
        )  # fmt: skip
        await second.end_of("a")
        assert said + second.tokens["a"] == continuation(PROMPT, 20)
        assert decode.pool.imported_blocks == 3
        assert decode.pool.imported_tails == 1
        assert second.updates["a"][0].cached_tokens == len(PROMPT)
        assert next(s for s in decode.forwards if s != [(0, 1)]) == [(200, 1)]
        async with Link(one_address) as link:
            with pytest.raises(NotFound):
                await WorkerClient(link).fetch_tail("a")
        await settled(one)
        await settled(two)


async def test_a_hand_over_brings_what_shards_did_not_take_before() -> None:
    decode = FakeModel()
    async with (
        shard() as (_, shard_address),
        worker(FakeModel()) as (one, one_address),
        worker(decode) as (_, two_address),
        attached(one_address) as first,
        attached(two_address) as second,
    ):
        await first.submit("unshared", PROMPT)
        await first.end_of("unshared")
        await first.submit("dead", PROMPT, prefill_only=True, shard_addresses=["127.0.0.1:1"])
        await first.end_of("dead")
        await settled(one)
        shards = [shard_address]
        await first.submit("a", PROMPT, prefill_only=True, shard_addresses=shards)
        await first.end_of("a")
        assert first.updates["a"][0].cached_tokens == 3 * BLOCK_SIZE
        await second.submit("a", PROMPT + first.tokens["a"], shard_addresses=shards)
        await second.end_of("a")
        assert decode.pool.imported_blocks == 3


async def test_a_hand_over_whose_tail_and_shards_are_gone_is_computed_again() -> None:
    async with worker(FakeModel()) as (service, address), attached(address) as router:
        said = continuation(PROMPT, 1)
        await router.submit(
            "a", PROMPT + said, num_prompt_tokens=len(PROMPT), tail_address="127.0.0.1:1",
            shard_addresses=["127.0.0.1:1"],
        )  # fmt: skip
        await router.end_of("a")
        assert said + router.tokens["a"] == continuation(PROMPT, 20)
        assert router.updates["a"][0].cached_tokens == 0
        await settled(service)


async def test_drain_refuses_new_work_and_finishes_what_runs() -> None:
    async with worker(FakeModel()) as (service, address), attached(address) as router:
        await router.submit("a", PROMPT, sampling={"max_tokens": 300, "ignore_eos": True})
        await router.until(lambda: "a" in router.tokens)
        draining = asyncio.create_task(service.drain())
        await router.until(lambda: router.load.draining)
        await router.submit("b", PROMPT)
        end = await router.end_of("b")
        assert end.error.code == Unavailable.code.value[0]
        await draining
        await router.end_of("a")
        assert router.tokens["a"] == continuation(PROMPT, 300, eos=None)


async def test_describe() -> None:
    async with worker(FakeModel(), role="prefill") as (_, address), Link(address) as link:
        found = await WorkerClient(link).describe()
        assert (found.member_id, found.role, found.probed) == ("worker-0", "prefill", True)
        assert found.device == "fake" and not found.simulated
        assert found.model.max_context == 2048
        assert found.load.blocks_free == found.load.blocks_total == 64


def test_workers_are_counted_over_all_tables() -> None:
    tables = (WorkerConfig(role="prefill", count=2), WorkerConfig(role="decode"))
    config = MeshConfig(workers=tables)
    roles = [worker_config(config, f"worker-{i}").role for i in range(3)]
    assert roles == ["prefill", "prefill", "decode"]
    with pytest.raises(ConfigError, match="worker-0 to worker-2"):
        worker_config(config, "worker-3")


async def test_membership_from_start_to_close() -> None:
    async with mesh() as (recording, mesh_address):
        async with worker(FakeModel(), mesh_address, role="decode") as (_, address):
            (member,) = recording.members
            assert (member.member_id, member.incarnation, member.kind) == ("worker-0", 77, "worker")
            assert (member.role, member.address, member.device) == ("decode", address, "fake")
            assert member.model.eos_token_ids == [7]
        assert recording.left == ["worker-0"]
