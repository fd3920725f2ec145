"""Scripted processes for the router's tests: workers, a tokenizer and a shard over real gRPC.

A fake worker says next_token(all ids so far), so a request that moved and lost, repeated or swapped
one id says something else from there on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from span_sink import SpanSink

from kvmesh.services.common.client import Link
from kvmesh.services.common.config import MeshConfig, RouterConfig
from kvmesh.services.common.process import ProcessContext, new_incarnation
from kvmesh.services.common.security import Security
from kvmesh.services.common.server import serve
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.services.router.client import InferenceClient
from kvmesh.services.router.service import RouterService
from kvmesh.v1 import (
    common_pb2,
    inference_pb2,
    kvcache_pb2_grpc,
    mesh_pb2,
    mesh_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

VOCAB = 1000
WAIT_S = 10.0
FORMAT = common_pb2.BlockFormat(
    fingerprint=bytes(16), codec="fp32", block_size=64, block_bytes=4096
)
MODEL = inference_pb2.ModelInfo(name="mini", vocab_size=VOCAB, max_context=2048, format=FORMAT)


def next_token(ids: Sequence[int]) -> int:
    """Depends on every id and on its place."""
    value = 7
    for token in ids:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def expected(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


def text_of(ids: Sequence[int]) -> str:
    return "".join(f"{token}é " for token in ids)


async def until(holds: Callable[[], bool], what: str) -> None:
    """Lets the loop run until `holds()`; fails after WAIT_S."""
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0.002)
    assert holds(), what


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """pause_after: tokens of each request after which it waits for `resume`; None: never.

    answer: called with each Submit; what it returns is sent instead of tokens.
    """

    def __init__(self, member_id: str, role: str = "both") -> None:
        self.member_id = member_id
        self.role = role
        self.incarnation = new_incarnation()
        self.held: list[bytes] = []
        self.load = worker_pb2.LoadReport(blocks_total=100, blocks_free=100)
        self.submits: list[worker_pb2.Submit] = []
        self.cancels: asyncio.Queue[str] = asyncio.Queue()
        self.pause_after: int | None = None
        self.resume = asyncio.Event()
        self.answer: Callable[[worker_pb2.Submit], worker_pb2.TokenUpdate | None] = lambda _: None
        self.out: asyncio.Queue[worker_pb2.WorkerMessage] = asyncio.Queue()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.attached = 0

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[worker_pb2.WorkerMessage]:
        self.attached += 1
        self.out = asyncio.Queue()
        self.out.put_nowait(
            worker_pb2.WorkerMessage(
                hello=worker_pb2.Hello(member_id=self.member_id, model=MODEL),
                events=self.events(1, True, self.held),
                load=self.load,
            )
        )
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                yield await self.out.get()
        finally:
            for task in (reader, *self.tasks.values()):
                task.cancel()
            await asyncio.gather(reader, *self.tasks.values(), return_exceptions=True)

    def events(
        self, sequence: int, snapshot: bool = False, stored: Sequence[bytes] = ()
    ) -> common_pb2.BlockEvents:
        return common_pb2.BlockEvents(
            incarnation=self.incarnation, sequence=sequence, snapshot=snapshot, stored=stored
        )

    def say(self, update: worker_pb2.TokenUpdate) -> None:
        self.out.put_nowait(worker_pb2.WorkerMessage(updates=[update]))

    async def _read(self, requests: Any) -> None:
        async for message in requests:
            for submit in message.submit:
                self.submits.append(submit)
                self.tasks[submit.request_id] = asyncio.create_task(self._run(submit))
            for cancel in message.cancel:
                self.tasks[cancel.request_id].cancel()
                self.cancels.put_nowait(cancel.request_id)

    async def _run(self, submit: worker_pb2.Submit) -> None:
        answer = self.answer(submit)
        if answer is not None:
            answer.request_id = submit.request_id
            self.say(answer)
            return
        ids = list(submit.token_ids)
        most = submit.num_prompt_tokens + submit.sampling.max_tokens
        said = 0
        while len(ids) < most:
            if self.pause_after is not None and said >= self.pause_after:
                await self.resume.wait()
            ids.append(next_token(ids))
            said += 1
            ended = len(ids) == most
            update = worker_pb2.TokenUpdate(request_id=submit.request_id, token_ids=ids[-1:])
            update.cached_tokens = 64 if said == 1 else 0
            if ended:
                update.finish_reason = common_pb2.FINISH_REASON_LENGTH
            self.say(update)
            if submit.prefill_only:
                self.say(
                    worker_pb2.TokenUpdate(
                        request_id=submit.request_id,
                        finish_reason=common_pb2.FINISH_REASON_HANDOVER,
                    )
                )
                return
            await asyncio.sleep(0)


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServicer):
    """Text is each id in decimal, so nothing is ambiguous; a prompt's ids are its code points."""

    def __init__(self, member_id: str = "tokenizer") -> None:
        self.member_id = member_id
        self.role = ""
        self.incarnation = new_incarnation()
        self.messages = 0
        self.streams = 0
        self.break_after: int | None = None  # messages of a stream
        self.open: set[str] = set()

    async def Encode(self, request: Any, context: Any) -> tokenizer_pb2.EncodeResponse:
        text = request.text or "".join(m.content for m in request.chat.messages)
        return tokenizer_pb2.EncodeResponse(token_ids=[ord(char) for char in text])

    async def Detokenize(
        self, requests: Any, context: Any
    ) -> AsyncIterator[tokenizer_pb2.DetokenizeResponse]:
        self.streams += 1
        said: dict[str, list[int]] = {}
        opening: dict[str, tokenizer_pb2.DetokenizeItem] = {}
        self.open.clear()
        count = 0
        async for request in requests:
            count += 1
            self.messages += 1
            if self.break_after is not None and count > self.break_after:
                self.break_after = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted death")
            items = []
            for item in request.items:
                opening.setdefault(item.request_id, item)
                self.open.add(item.request_id)
                ids = said.setdefault(item.request_id, [])
                items.append(self._say(opening[item.request_id], ids, item))
                if items[-1].stopped or item.end:
                    del said[item.request_id], opening[item.request_id]
                    self.open.discard(item.request_id)
            yield tokenizer_pb2.DetokenizeResponse(items=items)

    def _say(
        self, opening: Any, ids: list[int], item: tokenizer_pb2.DetokenizeItem
    ) -> tokenizer_pb2.DetokenizedText:
        before = len(text_of(ids))
        for token in item.token_ids:
            ids.append(token)
            text = text_of(ids)
            for stop in opening.stop:
                if stop in text:
                    return tokenizer_pb2.DetokenizedText(
                        request_id=item.request_id,
                        text=text[before : text.index(stop)],
                        stopped=True,
                        num_tokens=len(ids),
                    )
        return tokenizer_pb2.DetokenizedText(
            request_id=item.request_id, text=text_of(ids)[before:], num_tokens=len(ids)
        )


class FakeShard(kvcache_pb2_grpc.KvCacheServicer):
    """Tells the keys of `held`; what is put into `out` follows."""

    def __init__(self, member_id: str, held: Sequence[bytes] = ()) -> None:
        self.member_id = member_id
        self.role = ""
        self.incarnation = new_incarnation()
        self.held = list(held)
        self.watches = 0
        self.out: asyncio.Queue[common_pb2.BlockEvents | None] = asyncio.Queue()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[common_pb2.BlockEvents]:
        self.watches += 1
        yield common_pb2.BlockEvents(
            incarnation=self.incarnation, sequence=1, snapshot=True, stored=self.held
        )
        while (events := await self.out.get()) is not None:
            yield events


Fake = FakeWorker | FakeTokenizer | FakeShard


@dataclass(slots=True)
class Member:
    """A fake that listens and has joined."""

    fake: Fake
    server: grpc.aio.Server
    port: int


class MeshOfFakes:
    """A real router and fakes that join it."""

    def __init__(self, service: RouterService, addresses: Sequence[str]) -> None:
        self.service = service
        self.public, self.mesh = addresses
        self.members: dict[str, Member] = {}
        self.link = Link(self.public)
        self.client = InferenceClient(self.link)
        self._mesh_link = Link(self.mesh)
        self.stub = mesh_pb2_grpc.MeshStub(self._mesh_link.channel)

    async def join(self, fake: Fake, port: int = 0) -> Member:
        server = grpc.aio.server()
        if isinstance(fake, FakeWorker):
            kind = "worker"
            worker_pb2_grpc.add_WorkerServicer_to_server(fake, server)
        elif isinstance(fake, FakeTokenizer):
            kind = "tokenizer"
            tokenizer_pb2_grpc.add_TokenizerServicer_to_server(fake, server)
        else:
            kind = "kvcache"
            kvcache_pb2_grpc.add_KvCacheServicer_to_server(fake, server)
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        member = self.members[fake.member_id] = Member(fake, server, port)
        await self.stub.Register(
            mesh_pb2.RegisterRequest(
                member=mesh_pb2.Member(
                    member_id=fake.member_id,
                    incarnation=fake.incarnation,
                    kind=kind,
                    role=fake.role,
                    address=f"127.0.0.1:{port}",
                    model=None if kind == "kvcache" else MODEL,
                )
            ),
            timeout=WAIT_S,
        )
        if isinstance(fake, FakeWorker):
            await self.serving(fake.member_id)
        return member

    async def serving(self, member_id: str) -> None:
        workers = self.service.parts.core.workers

        def serving() -> bool:
            state = workers.get(member_id)
            return state is not None and state.state == "serving"

        await until(serving, f"{member_id} serves")

    async def kill(self, member_id: str) -> Member:
        """Its connections break at once; its lease goes on."""
        member = self.members.pop(member_id)
        await member.server.stop(0)
        return member

    async def close(self) -> None:
        for member_id in list(self.members):
            await self.kill(member_id)
        await self.link.close()
        await self._mesh_link.close()


@asynccontextmanager
async def mesh_of(
    *fakes: Fake, spans: SpanSink | None = None, **router: Any
) -> AsyncIterator[MeshOfFakes]:
    """A router on random ports with these members; leases are long, so no test renews one."""
    config = MeshConfig(router=RouterConfig(port=0, **{"lease_s": 600.0, **router}))
    telemetry = Telemetry("router", "router", spans.senders if spans else None)
    service = RouterService(ProcessContext(config, "router", "", Security(), telemetry))
    bound: asyncio.Future[Sequence[str]] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(
        serve(service, Security(), lambda _: None, stop, on_bound=bound.set_result)
    )
    async with AsyncExitStack() as stack:
        stack.callback(telemetry.close)
        await asyncio.wait({task, bound}, return_when=asyncio.FIRST_COMPLETED)
        mesh = MeshOfFakes(service, await bound if bound.done() else task.result() or ())

        async def end() -> None:
            stop.set()
            await asyncio.wait_for(task, WAIT_S)

        stack.push_async_callback(mesh.close)
        stack.push_async_callback(end)
        for fake in fakes:
            await mesh.join(fake)
        yield mesh


def tokens(prompt: Sequence[int], count: int, **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenPrompt(ids=prompt),
        sampling=common_pb2.SamplingParams(max_tokens=count, **sampling),
        echo_token_ids=True,
    )


@dataclass(slots=True)
class Heard:
    """All that a caller heard of one request."""

    text: str
    ids: list[int]
    responses: list[inference_pb2.GenerateResponse]

    @property
    def last(self) -> inference_pb2.GenerateResponse:
        return self.responses[-1]


async def hear(client: InferenceClient, request: inference_pb2.GenerateRequest) -> Heard:
    heard = Heard("", [], [])
    async for response in client.generate(request, WAIT_S):
        heard.responses.append(response)
        heard.text += response.text
        heard.ids += response.token_ids
    return heard
