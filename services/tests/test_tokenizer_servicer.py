"""The tokenizer over real gRPC: prompts, the one stream of many requests, and what breaks it."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvmesh.services.common.client import Deadlines, Link
from kvmesh.services.common.config import MeshConfig, ModelConfig
from kvmesh.services.common.errors import (
    ConfigError,
    Expired,
    Incompatible,
    InvalidRequest,
    MeshError,
    Unavailable,
)
from kvmesh.services.common.interceptors import MeshInterceptor
from kvmesh.services.common.process import ProcessContext
from kvmesh.services.common.security import Security
from kvmesh.services.common.server import serve
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.services.tokenizer import servicer as servicer_module
from kvmesh.services.tokenizer.client import DetokenizeStream, NewTokens, TokenizerClient
from kvmesh.services.tokenizer.core import CodecLimits, TextCodec, load_codec
from kvmesh.services.tokenizer.service import TokenizerService
from kvmesh.services.tokenizer.servicer import DetokenizeSession, TokenizerServicer
from kvmesh.v1 import inference_pb2, mesh_pb2, mesh_pb2_grpc, tokenizer_pb2_grpc
from kvmesh.v1 import tokenizer_pb2 as pb

from .tokenizer_models import byte_level, save

INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]
WAIT_S = 10.0


@dataclass
class Served:
    servicer: TokenizerServicer
    codec: TextCodec
    address: str
    server: grpc.aio.Server

    async def until(self, done: Callable[[], bool]) -> None:
        """Waits for the servicer's own signal that its state changed."""
        async with asyncio.timeout(WAIT_S):
            while not done():
                self.servicer._changed.clear()
                await self.servicer._changed.wait()


@asynccontextmanager
async def serving(codec: TextCodec, port: int = 0) -> AsyncIterator[Served]:
    telemetry = Telemetry("tokenizer", "tokenizer")
    server = grpc.aio.server(interceptors=[MeshInterceptor()], options=(("grpc.so_reuseport", 0),))
    with ThreadPoolExecutor(2) as executor:
        servicer = TokenizerServicer(codec, executor, telemetry)
        tokenizer_pb2_grpc.add_TokenizerServicer_to_server(servicer, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        try:
            yield Served(servicer, codec, f"127.0.0.1:{bound}", server)
        finally:
            await server.stop(0)
            telemetry.close()


@pytest.fixture
def codec(tmp_path: Path) -> TextCodec:
    return load_codec(save(byte_level(), tmp_path), CodecLimits(max_text_bytes=100_000))


@pytest.fixture
async def served(codec: TextCodec) -> AsyncIterator[Served]:
    async with serving(codec) as it:
        yield it


@pytest.fixture
async def link(served: Served) -> AsyncIterator[Link]:
    async with Link(served.address) as it:
        yield it


def chat(*contents: str, role: str = "user") -> inference_pb2.ChatPrompt:
    return inference_pb2.ChatPrompt(
        messages=[inference_pb2.ChatMessage(role=role, content=text) for text in contents]
    )


@pytest.mark.parametrize("size", [10, 20_000])  # done at once, and in a thread
async def test_encode_and_decode(link: Link, codec: TextCodec, size: int) -> None:
    client = TokenizerClient(link)
    text = "the dog 你好 " * (size // 10)
    reply = await client.encode(text)
    assert list(reply.token_ids) == codec.encode_text(text).ids
    assert await client.decode(reply.token_ids) == text
    assert (await client.decode(reply.token_ids, True)) == "<s>" + text
    messages = [{"role": "user", "content": text}]
    assert list((await client.encode(chat(text))).token_ids) == codec.encode_chat(messages).ids
    again = await client.encode(chat(text))
    assert (again.cached_chars > size // 2) == (size > 1000)


async def test_refusals_arrive_as_their_class(link: Link, codec: TextCodec) -> None:
    client = TokenizerClient(link)
    for prompt, reason in (
        ("", "prompt is empty"),
        (chat(), "no messages"),
        ("a" * 100_001, "100001 bytes, must have at most 100000"),
        (chat("hi", role="robot"), "unknown role robot"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            await client.encode(prompt)
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        await client.decode([codec.vocab_size])
    send: Any = link.channel.unary_unary("/kvmesh.v1.Tokenizer/Encode")
    with pytest.raises(grpc.aio.AioRpcError) as malformed:
        await send(b"\x0a\xff\xff", timeout=5)
    assert malformed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as not_utf8:
        await send(b"\x0a\x02\xc3\x28", timeout=5)
    assert not_utf8.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_many_requests_share_the_stream(link: Link, codec: TextCodec, served: Served) -> None:
    seed = 11
    rng = random.Random(seed)
    ids = {f"r{n}": rng.choices(range(codec.vocab_size), k=rng.randint(1, 60)) for n in range(80)}
    text = dict.fromkeys(ids, "")
    stream = DetokenizeStream(link)
    for name in ids:
        stream.open(name)
    at = dict.fromkeys(ids, 0)

    async def worker(names: list[str]) -> None:
        while names:
            items = []
            for name in names:
                size = rng.randint(0, 4)
                part = ids[name][at[name] : at[name] + size]
                at[name] += size
                items.append(NewTokens(name, part, end=at[name] >= len(ids[name])))
            for item, answer in zip(items, await stream.feed(items), strict=True):
                assert answer.request_id == item.request_id, seed
                text[item.request_id] += answer.text
                if item.end:
                    assert answer.num_tokens == len(ids[item.request_id]), seed
            names = [item.request_id for item in items if not item.end]

    await asyncio.gather(*(worker(list(ids)[n::4]) for n in range(4)))
    assert {name: codec.decode(ids[name]) for name in ids} == text, seed
    assert served.servicer.num_open == 0
    assert stream.num_streams == 1
    await stream.close()


async def test_error_of_one_item_leaves_the_others_alone(link: Link, codec: TextCodec) -> None:
    call = tokenizer_pb2_grpc.TokenizerStub(link.channel).Detokenize(timeout=WAIT_S)
    good = codec.encode_text("the dog").ids
    items = [
        pb.DetokenizeItem(request_id="bad", token_ids=[codec.vocab_size]),
        pb.DetokenizeItem(request_id="good", token_ids=good),
        pb.DetokenizeItem(request_id="", token_ids=good),
        pb.DetokenizeItem(request_id="stop", stop=[""], token_ids=good),
    ]
    await call.write(pb.DetokenizeRequest(items=items))
    answer = await call.read()
    assert isinstance(answer, pb.DetokenizeResponse)
    assert [item.error.code for item in answer.items] == [INVALID, 0, INVALID, INVALID]
    assert "outside the vocabulary" in answer.items[0].error.message
    assert answer.items[1].text == "the dog"
    await call.write(pb.DetokenizeRequest())
    assert await call.read() == pb.DetokenizeResponse()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_malformed_message_ends_its_stream_only(link: Link, served: Served) -> None:
    call: Any = link.channel.stream_stream("/kvmesh.v1.Tokenizer/Detokenize")(timeout=WAIT_S)
    await call.write(b"\x0a\xff")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await TokenizerClient(link).encode("still there")).token_ids


async def test_cancelled_stream_forgets_its_requests(
    link: Link, codec: TextCodec, served: Served
) -> None:
    call = tokenizer_pb2_grpc.TokenizerStub(link.channel).Detokenize(timeout=WAIT_S)
    ids = codec.encode_text("the dog").ids
    items = [pb.DetokenizeItem(request_id=f"r{n}", token_ids=ids) for n in range(5)]
    await call.write(pb.DetokenizeRequest(items=items))
    await call.read()
    assert served.servicer.num_open == 5
    call.cancel()
    await served.until(lambda: served.servicer.num_open == 0)
    assert not served.servicer._sessions


async def test_drain_waits_for_open_requests(link: Link, codec: TextCodec, served: Served) -> None:
    stream = DetokenizeStream(link)
    stream.open("r")
    await stream.feed([NewTokens("r", [5])])
    drained = asyncio.create_task(served.servicer.drain())
    with pytest.raises(Unavailable, match="shuts down"):
        await TokenizerClient(link).encode("late")
    assert not drained.done()
    await stream.feed([NewTokens("r", [6], end=True)])
    await asyncio.wait_for(drained, WAIT_S)
    await stream.close()


def test_late_ids_of_a_stopped_request_do_not_open_it_again(codec: TextCodec) -> None:
    session = DetokenizeSession(codec)

    def ask(**fields: object) -> pb.DetokenizedText:
        item = pb.DetokenizeItem(request_id="r", **fields)  # type: ignore[arg-type]
        return session.answer(pb.DetokenizeRequest(items=[item])).items[0]

    ids = codec.encode_text("the dog").ids
    first = ask(token_ids=ids, stop=[" d"])
    assert first.text == "the" and first.stopped and 0 < first.num_tokens <= len(ids)
    late = ask(token_ids=ids)
    assert (late.text, late.stopped, late.num_tokens) == ("", True, first.num_tokens)
    assert session.num_open == 0
    ask(end=True)
    assert ask(token_ids=ids, end=True).text == "the dog"  # the name is free again
    assert session.num_open == 0


def test_closed_requests_are_remembered_in_a_bounded_number(
    codec: TextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer_module, "MAX_CLOSED", 10)
    session = DetokenizeSession(codec)
    for n in range(50):
        item = pb.DetokenizeItem(request_id=f"r{n}", token_ids=[codec.vocab_size])
        session.answer(pb.DetokenizeRequest(items=[item]))
    assert list(session._closed) == [f"r{n}" for n in range(40, 50)]


async def test_stopped_and_dropped_requests_leave_nothing_behind(
    link: Link, codec: TextCodec, served: Served
) -> None:
    stream = DetokenizeStream(link)
    ids = codec.encode_text("the dog").ids
    stream.open("stopped", stop=[" d"])
    with pytest.raises(InvalidRequest, match="already open"):
        stream.open("stopped")
    stream.open("dropped")
    stream.open("unused")
    answers = await stream.feed([NewTokens("stopped", ids), NewTokens("dropped", ids)])
    assert [(a.text, a.stopped) for a in answers] == [("the", True), ("the dog", False)]
    late = await stream.feed([NewTokens("stopped", ids), NewTokens("unknown", ids)])
    assert [(a.request_id, a.text, a.stopped) for a in late] == [
        ("stopped", "", True),
        ("unknown", "", True),
    ]
    stream.drop("dropped")
    stream.drop("unused")
    stream.drop("unknown")
    await served.until(lambda: served.servicer.num_open == 0)
    (session,) = served.servicer._sessions
    stream.open("last")
    await stream.feed([NewTokens("last", ids, end=True)])
    assert not session._closed and not stream._sequences
    await stream.close()


async def test_lost_stream_is_replayed_without_saying_anything_twice(codec: TextCodec) -> None:
    ids = codec.encode_text("the quick brown fox 😀 jumps over the lazy dog").ids[1:]
    half = len(ids) // 2
    text = {"a": "", "b": ""}

    def take(answers: list[pb.DetokenizedText]) -> None:
        for answer in answers:
            assert not answer.HasField("error")
            text[answer.request_id] += answer.text

    async with serving(codec) as first, Link(first.address) as link:
        port = int(first.address.rpartition(":")[2])
        stream = DetokenizeStream(link)
        stream.open("a")
        stream.open("b", stop=["lazy"])
        for token_id in ids[:half]:
            take(await stream.feed([NewTokens("a", [token_id]), NewTokens("b", [token_id])]))
        assert text["a"] and text["b"]
        await first.server.stop(0)
        waiting = asyncio.create_task(
            stream.feed([NewTokens("a", ids[half : half + 1]), NewTokens("b", ids[half:])])
        )
        async with serving(codec, port) as second:
            take(await waiting)
            last = await stream.feed([NewTokens("a", ids[half + 1 :], end=True)])
            take(last)
            assert last[0].num_tokens == len(ids)
            assert stream.num_streams > 1
            await second.until(lambda: second.servicer.num_open == 0)
            await stream.close()
    whole = codec.decode(ids)
    assert text == {"a": whole, "b": whole[: whole.index("lazy")]}


class Scripted(tokenizer_pb2_grpc.TokenizerServicer):
    """Ends each stream after so many messages, or answers something else."""

    def __init__(self, codec: TextCodec, plan: list[int | pb.DetokenizeResponse]) -> None:
        self.codec = codec
        self.plan = plan

    async def Detokenize(self, request_iterator, context):  # type: ignore[no-untyped-def]
        session = DetokenizeSession(self.codec)
        step = self.plan.pop(0) if self.plan else 1 << 30
        left = step if isinstance(step, int) else 1
        async for request in request_iterator:
            if left < 0:  # not before: a message that is written while the call ends hides its end
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
            if left == 0:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone before the answer")
            left -= 1
            yield step if not isinstance(step, int) else session.answer(request)


@asynccontextmanager
async def scripted(
    codec: TextCodec, *plan: int | pb.DetokenizeResponse
) -> AsyncIterator[DetokenizeStream]:
    server = grpc.aio.server()
    scripts = Scripted(codec, list(plan))  # type: ignore[abstract]
    tokenizer_pb2_grpc.add_TokenizerServicer_to_server(scripts, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Link(f"127.0.0.1:{port}") as link:
        stream = DetokenizeStream(link)
        try:
            yield stream
        finally:
            await stream.close()
            await server.stop(0)


@pytest.mark.parametrize("seed", range(5))
async def test_text_survives_any_number_of_lost_streams(codec: TextCodec, seed: int) -> None:
    rng = random.Random(seed)
    ids = rng.choices(range(codec.vocab_size), k=30)
    async with scripted(codec, *(rng.randint(0, 4) for _ in range(5))) as stream:
        stream.open("r")
        feeds: list[asyncio.Task[list[pb.DetokenizedText]]] = []
        for n, token_id in enumerate(ids):
            feeds.append(
                asyncio.create_task(stream.feed([NewTokens("r", [token_id], end=n == 29)]))
            )
            if rng.random() < 0.5:
                await asyncio.wait([feeds[-1]])  # the others are sent together
        answers = [answer for feed in feeds for answer in await feed]
        assert "".join(answer.text for answer in answers) == codec.decode(ids), seed
        assert stream.num_streams > 1


async def test_a_feed_that_was_given_up_is_made_good_by_the_next(codec: TextCodec) -> None:
    ids = codec.encode_text("the lazy dog").ids
    async with scripted(codec, 0) as stream:
        stream.open("r")
        given_up = asyncio.create_task(stream.feed([NewTokens("r", ids[:2])]))
        await asyncio.sleep(0)
        given_up.cancel()
        (answer,) = await stream.feed([NewTokens("r", ids[2:], end=True)])
        assert answer.text == codec.decode(ids)
        assert answer.num_tokens == len(ids)


async def test_errors_of_the_stream_reach_who_waits(codec: TextCodec) -> None:
    too_many = pb.DetokenizeResponse(items=[pb.DetokenizedText(request_id="r")] * 3)
    async with scripted(codec, -1, too_many) as stream:
        stream.open("r")
        with pytest.raises(MeshError, match="full"):
            await stream.feed([NewTokens("r", [5])])
        with pytest.raises(MeshError, match="answered 3 items, was asked 1"):
            await stream.feed([NewTokens("r", [6])])
        stream.drop("r")
        stream.open("r")
        for outside in (-1, 1 << 32):
            with pytest.raises(InvalidRequest, match="outside"):
                await stream.feed([NewTokens("r", [outside])])
        (answer,) = await stream.feed([NewTokens("r", [5], end=True)])
        assert answer.text == codec.decode([5])


async def test_tokenizer_that_is_away_means_expired_and_close_means_unavailable() -> None:
    async with Link("127.0.0.1:1") as link:
        stream = DetokenizeStream(link, feed_s=0.05)
        stream.open("r")
        with pytest.raises(Expired, match=r"127\.0\.0\.1:1 within 0\.05 s"):
            await stream.feed([NewTokens("r", [1])])
        patient = DetokenizeStream(link)
        patient.open("r")
        waiting = asyncio.create_task(patient.feed([NewTokens("r", [1])]))
        await asyncio.sleep(0)
        await patient.close()
        with pytest.raises(Unavailable, match="closed"):
            await waiting
        with pytest.raises(Unavailable, match="closed"):
            await patient.feed([NewTokens("r", [1])])
        await stream.close()
        await stream.close()


class RecordingMesh(mesh_pb2_grpc.MeshServicer):
    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.members: list[mesh_pb2.Member] = []
        self.left: list[str] = []

    async def Register(self, request, context):  # type: ignore[no-untyped-def]
        if self.refuse:
            raise Incompatible("the mesh runs model 'other'")
        self.members.append(request.member)
        return mesh_pb2.RegisterResponse(lease_ms=1000)

    async def Renew(self, request, context):  # type: ignore[no-untyped-def]
        return mesh_pb2.RenewResponse(lease_ms=1000)

    async def Leave(self, request, context):  # type: ignore[no-untyped-def]
        self.left.append(request.member_id)
        return mesh_pb2.LeaveResponse()

    async def ListMembers(self, request, context):  # type: ignore[no-untyped-def]
        return mesh_pb2.ListMembersResponse(members=self.members)


@asynccontextmanager
async def mesh(servicer: RecordingMesh) -> AsyncIterator[ProcessContext]:
    server = grpc.aio.server(interceptors=[MeshInterceptor()])
    mesh_pb2_grpc.add_MeshServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    telemetry = Telemetry("tokenizer", "tokenizer")
    try:
        yield ProcessContext(MeshConfig(), "tokenizer", f"127.0.0.1:{port}", Security(), telemetry)
    finally:
        telemetry.close()
        await server.stop(0)


async def test_process_joins_serves_and_leaves() -> None:
    recorded = RecordingMesh()
    async with mesh(recorded) as context:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        task = asyncio.create_task(
            serve(TokenizerService(context), Security(), lambda a: ready.set_result(a[0]), stop)
        )
        address = await asyncio.wait_for(ready, WAIT_S)
        (member,) = recorded.members
        assert (member.member_id, member.kind, member.address) == (
            "tokenizer",
            "tokenizer",
            address,
        )
        assert (member.model.name, member.model.vocab_size) == ("mini", 1088)
        assert member.incarnation == context.incarnation
        async with Link(address) as link:
            client = TokenizerClient(link, Deadlines(encode_s=5))
            reply = await client.encode(chat("hello"))
            said = await client.decode(reply.token_ids, keep_special_tokens=True)
            assert said == "<|begin|><|user|>hello<|end|><|assistant|>"
        stop.set()
        await asyncio.wait_for(task, WAIT_S)
        assert recorded.left == ["tokenizer"]


async def test_process_that_the_mesh_refuses_ends() -> None:
    async with mesh(RecordingMesh(refuse=True)) as context:
        with pytest.raises(Incompatible, match="model 'other'"):
            await serve(TokenizerService(context), Security(), lambda _: None, asyncio.Event())


def test_missing_model_is_named_before_anything_is_bound() -> None:
    telemetry = Telemetry("tokenizer", "tokenizer")
    config = MeshConfig(model=ModelConfig(name="absent"))
    context = ProcessContext(config, "tokenizer", "", Security(), telemetry)
    with pytest.raises(ConfigError, match="'absent' is not bundled"):
        TokenizerService(context)
    telemetry.close()
