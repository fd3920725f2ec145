"""A mesh that answers as it is told, and a caller of the edge that needs no network."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Message

from kvmesh.services.common.callers import Callers
from kvmesh.services.common.config import GatewayConfig
from kvmesh.services.common.errors import InvalidRequest
from kvmesh.services.common.security import Security
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.services.gateway.app import Edge, make_app
from kvmesh.services.gateway.transport import Connections, HttpListener
from kvmesh.v1 import common_pb2, inference_pb2

WAIT_S = 10.0
MODEL = inference_pb2.ModelInfo(name="mini", vocab_size=300, max_context=100)


class Bytes:
    """Each id below 256 is that byte; the others are nothing."""

    def token(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        if max(token_ids) >= 300:
            raise InvalidRequest(f"token id {max(token_ids)} is outside the vocabulary of 300")
        return b"".join(map(self.token, token_ids)).decode(errors="replace")


class FakeMesh:
    """words: said in turn. error: raised after `error_after` words. hold: waits there for ever."""

    def __init__(self, words: Sequence[str] = ("Hel", "lo é"), **script: Any) -> None:
        self.words = list(words)
        self.error: Exception | None = script.get("error")
        self.error_after: int = script.get("error_after", 0)
        self.hold: bool = script.get("hold", False)
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.behalves: list[str] = []
        self.open = 0
        self.closed = asyncio.Event()

    async def generate(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.open += 1
        try:
            for number, word in enumerate(self.words):
                if self.error is not None and number == self.error_after:
                    raise self.error
                yield self.said(word, request)
                await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
            if self.hold:
                await asyncio.Event().wait()
            yield inference_pb2.GenerateResponse(
                finish_reason=common_pb2.FINISH_REASON_STOP,
                usage=inference_pb2.Usage(prompt_tokens=7, cached_tokens=4, completion_tokens=3),
            )
        finally:
            self.open -= 1
            if not self.open:
                self.closed.set()

    def said(
        self, word: str, request: inference_pb2.GenerateRequest
    ) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse(text=word)
        if request.sampling.logprobs:
            first = word.encode()[0]
            top = [first, 195][: request.sampling.top_logprobs]
            response.logprobs.add(
                token_id=first,
                logprob=-0.5,
                top_token_ids=top,
                top_logprobs=[-0.5, float("-inf")][: len(top)],
            )
        return response

    def on_behalf(self, authorization: str) -> "FakeMesh":
        self.behalves.append(authorization)
        return self

    async def list_models(self) -> inference_pb2.ListModelsResponse:
        if self.error is not None:
            raise self.error
        return inference_pb2.ListModelsResponse(models=[MODEL])


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        body = self.json
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        found: dict[str, Any] = body["error"]
        return found

    @property
    def events(self) -> list[Any]:
        """The data of each event; the strings that are no JSON stay as they are."""
        assert self.headers["content-type"].startswith("text/event-stream")
        texts = self.body.decode().split("\n\n")
        assert texts.pop() == ""
        assert all(text.startswith("data: ") for text in texts)
        datas = [text.removeprefix("data: ") for text in texts]
        return [json.loads(data) if data.startswith("{") else data for data in datas]


def edge_of(mesh: FakeMesh, callers: Callers | None = None, **config: Any) -> Edge:
    telemetry = Telemetry("gateway", "gateway", None)
    return Edge(
        mesh, Bytes(), telemetry, GatewayConfig(**config), "router:1", callers or Callers(),
        fingerprint="fp_test",
    )  # fmt: skip


@dataclass
class Caller:
    """gone_after: the client goes away after so many parts of the answer."""

    edge: Edge
    gone_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    on_send: Callable[[], Any] | None = None

    async def post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.send(
            "POST", path, [data], **{"content-type": "application/json"}, **headers
        )

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.send("GET", path, [b""], **headers)

    async def send(self, method: str, path: str, parts: Sequence[bytes], **headers: str) -> Reply:
        reply = Reply()
        gone = asyncio.Event()
        waiting = list(parts)
        sent = 0

        async def receive() -> Message:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
                return
            reply.body += message.get("body", b"")
            sent += 1
            if self.gone_after is not None and sent >= self.gone_after:
                gone.set()

        named = {**self.headers, **headers}
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
            "headers": [(k.encode(), v.encode()) for k, v in named.items()],
            "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2),
        }  # fmt: skip
        async with asyncio.timeout(WAIT_S):
            await make_app(self.edge)(scope, receive, send)
        return reply


@asynccontextmanager
async def served(
    mesh: FakeMesh,
    callers: Callers | None = None,
    connections: Connections | None = None,
    **config: Any,
) -> AsyncIterator[tuple[str, int]]:
    """The address of an edge that listens."""
    edge = edge_of(mesh, callers, **config)
    listener = HttpListener(
        "127.0.0.1", 0, make_app(edge), edge.config, connections=connections or Connections()
    )
    server = listener.open(Security())
    try:
        parts = urlsplit(await server.bind())
        assert parts.hostname and parts.port
        yield parts.hostname, parts.port
    finally:
        await server.stop(0)


async def exchange(address: tuple[str, int], data: bytes) -> tuple[int, bytes]:
    """Sends bytes, then reads until the server closes: the status and the body."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        async with asyncio.timeout(WAIT_S):
            writer.write(data)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return int(head.split(b" ")[1]), body
