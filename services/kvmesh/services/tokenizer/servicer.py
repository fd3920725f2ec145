"""The Tokenizer service: translates between messages and the codec."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import grpc
from opentelemetry.trace import Status, StatusCode

from kvmesh.services.common import names
from kvmesh.services.common.errors import InvalidRequest, MeshError, Unavailable, status_number
from kvmesh.services.common.telemetry import Telemetry, extract
from kvmesh.services.tokenizer.core import TextCodec
from kvmesh.services.tokenizer.detokenize import Detokenizer
from kvmesh.services.tokenizer.prefix import Encoded
from kvmesh.v1 import common_pb2, inference_pb2, tokenizer_pb2_grpc
from kvmesh.v1 import tokenizer_pb2 as pb

T = TypeVar("T")

# Shorter work is done before a thread would have woken up (about 0.1 ms).
INLINE_BYTES = 512
INLINE_IDS = 1024
MAX_CLOSED = 4096  # per stream: closed requests whose late ids are still known as such


class DetokenizeSession:
    """The requests of one Detokenize stream."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._open: dict[str, Detokenizer] = {}
        self._closed: dict[str, pb.DetokenizedText] = {}  # the oldest first

    @property
    def num_open(self) -> int:
        return len(self._open)

    def answer(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(items=[self._answer_item(item) for item in request.items])

    def _answer_item(self, item: pb.DetokenizeItem) -> pb.DetokenizedText:
        closed = self._closed.get(item.request_id)
        if closed is not None:
            # Ids that were on their way when it stopped must not open it again.
            if item.end:
                del self._closed[item.request_id]
            return closed
        try:
            return self._feed(item)
        except MeshError as error:
            self._open.pop(item.request_id, None)
            failed = pb.DetokenizedText(
                request_id=item.request_id,
                error=common_pb2.RequestError(code=status_number(error), message=str(error)),
            )
            self._remember(item, failed)
            return failed

    def _feed(self, item: pb.DetokenizeItem) -> pb.DetokenizedText:
        if not item.request_id:
            raise InvalidRequest("request_id is empty, must have at least 1 character")
        self._codec.check_ids(item.token_ids)
        detokenizer = self._open.get(item.request_id)
        if detokenizer is None:
            detokenizer = self._open[item.request_id] = self._codec.open_detokenizer(
                item.stop, item.include_stop, item.keep_special_tokens
            )
        text, stopped, num_tokens = detokenizer.feed(item.token_ids, item.end)
        if stopped or item.end:
            del self._open[item.request_id]
        if stopped:
            closed = pb.DetokenizedText(
                request_id=item.request_id, stopped=True, num_tokens=num_tokens
            )
            self._remember(item, closed)
        return pb.DetokenizedText(
            request_id=item.request_id, text=text, stopped=stopped, num_tokens=num_tokens
        )

    def _remember(self, item: pb.DetokenizeItem, answer: pb.DetokenizedText) -> None:
        if item.end:
            return
        self._closed[item.request_id] = answer
        if len(self._closed) > MAX_CLOSED:
            del self._closed[next(iter(self._closed))]


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServicer):
    """executor: runs what would hold up the event loop; the tokenizer lets go of the GIL."""

    def __init__(self, codec: TextCodec, executor: Executor, telemetry: Telemetry) -> None:
        self._codec = codec
        self._executor = executor
        self._telemetry = telemetry
        self._sessions: set[DetokenizeSession] = set()
        self._encoding = 0
        self.prompts_encoded = 0
        self.tokens_encoded = 0
        self._draining = False
        self._changed = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Requests whose text is being streamed, and encodes that run."""
        return self._encoding + sum(session.num_open for session in list(self._sessions))

    async def drain(self) -> None:
        """Refuses new prompts; returns when no request is open any more."""
        self._draining = True
        while self.num_open:
            self._changed.clear()
            await self._changed.wait()

    async def Encode(
        self,
        request: pb.EncodeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.EncodeResponse:
        if self._draining:
            raise Unavailable("this tokenizer shuts down")
        span = self._telemetry.start(names.SPAN_ENCODE, extract(context.invocation_metadata()))
        self._encoding += 1
        try:
            encoded = await self._run(
                request.ByteSize() <= INLINE_BYTES, partial(_encode, self._codec, request)
            )
            span.set_attribute(names.TOKENS, len(encoded.ids))
            self.prompts_encoded += 1
            self.tokens_encoded += len(encoded.ids)
            return pb.EncodeResponse(token_ids=encoded.ids, cached_chars=encoded.cached_chars)
        except MeshError as error:
            span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            span.end()
            self._encoding -= 1
            self._changed.set()

    async def Decode(
        self,
        request: pb.DecodeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.DecodeResponse:
        text = await self._run(
            len(request.token_ids) <= INLINE_IDS,
            lambda: self._codec.decode(request.token_ids, request.keep_special_tokens),
        )
        return pb.DecodeResponse(text=text)

    async def Detokenize(
        self,
        request_iterator: AsyncIterator[pb.DetokenizeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.DetokenizeResponse]:
        session = DetokenizeSession(self._codec)
        self._sessions.add(session)
        try:
            async for request in request_iterator:
                num_ids = sum(len(item.token_ids) for item in request.items)
                yield await self._run(num_ids <= INLINE_IDS, partial(session.answer, request))
                self._changed.set()
        finally:
            self._sessions.discard(session)
            self._changed.set()

    async def _run(self, inline: bool, work: Callable[[], T]) -> T:
        if inline:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _encode(codec: TextCodec, request: pb.EncodeRequest) -> Encoded:
    kind: Any = request.WhichOneof("prompt")
    if kind == "chat":
        chat = request.chat
        messages = [_message(m) for m in chat.messages]
        return codec.encode_chat(messages, [*map(_tool, chat.tools)], request.cache_salt)
    return codec.encode_text(request.text, request.cache_salt)


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    """As chat templates know messages; what is not set is not there."""
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        shown["name"] = message.name
    if message.tool_call_id:
        shown["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        shown["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return shown


def _tool_call(call: inference_pb2.ToolCall) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves, so they get the object, not its text."""
    arguments = _json_object(call.arguments or "{}", f"arguments of tool call {call.name!r}")
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _tool(text: str) -> dict[str, Any]:
    return _json_object(text, "a tool")


def _json_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{what} is a JSON {type(value).__name__}, must be an object")
    return value
