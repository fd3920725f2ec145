"""The caller's end of the one stream that turns all requests' new ids into text."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain

import grpc

from kvmesh.services.common.client import Link
from kvmesh.services.common.errors import Expired, InvalidRequest, MeshError, Unavailable, from_rpc
from kvmesh.v1 import tokenizer_pb2 as pb
from kvmesh.v1 import tokenizer_pb2_grpc

logger = logging.getLogger(__name__)

FEED_S = 10.0  # for the text of one step, time for a restart of the tokenizer included
REOPEN_S = 0.1  # between a stream that broke and the next one


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Ids that one request got. end: no more follow; what is held back comes out."""

    request_id: str
    token_ids: Sequence[int]
    end: bool = False


@dataclass(slots=True, eq=False)
class _Sequence:
    """What is needed to tell a new stream all about a request."""

    opening: pb.DetokenizeItem
    token_ids: list[int] = field(default_factory=list)
    stream: int = 0  # number of the stream that knows it; 0: none yet
    num_said: int = 0  # characters given to the caller
    num_repeated: int = 0  # characters of them that the present stream has yet to say again
    closed: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    """ids start:stop of a sequence."""

    sequence: _Sequence
    start: int
    stop: int
    end: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    parts: list[_Part]
    reply: asyncio.Future[list[pb.DetokenizedText]]
    forget: bool = False  # for the present stream only; nobody waits for the answer


class DetokenizeStream:
    """One open stream to the tokenizer for all requests of a router.

    If it breaks, another is opened and told the ids so far of each request that goes on; callers
    only notice a delay, and no text twice. Needs a running event loop; close it at the end.
    """

    def __init__(self, link: Link, feed_s: float = FEED_S) -> None:
        self._link = link
        self._feed_s = feed_s
        self._stub = tokenizer_pb2_grpc.TokenizerStub(link.channel)
        self._sequences: dict[str, _Sequence] = {}
        self._waiting: deque[_Batch] = deque()
        self._sent: deque[list[_Batch]] = deque()  # what each unanswered message holds
        self._wake = asyncio.Event()
        self._num_streams = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def num_streams(self) -> int:
        """Streams opened so far; more than one means that the tokenizer was lost."""
        return self._num_streams

    def open(
        self,
        request_id: str,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        keep_special_tokens: bool = False,
    ) -> None:
        """Before a request's first ids. `drop` it when it ends without `end` or a stop string.

        Raises InvalidRequest if the id is in use.
        """
        if request_id in self._sequences:
            raise InvalidRequest(f"request {request_id!r} is already open")
        opening = pb.DetokenizeItem(
            request_id=request_id,
            stop=stop,
            include_stop=include_stop,
            keep_special_tokens=keep_special_tokens,
        )
        self._sequences[request_id] = _Sequence(opening)

    async def feed(self, items: Sequence[NewTokens]) -> list[pb.DetokenizedText]:
        """New text, one per item. Items of requests that are not open (any more) are answered
        with no text and `stopped`, since ids of a stopped request may still be on their way.

        Calls may overlap; a request's ids count in the order of the calls. An item may come back
        with `error`; it is then closed. Raises Expired or what broke the stream; `drop` then.
        """
        if self._closed:
            raise Unavailable("the stream to the tokenizer is closed")
        for item in items:
            if item.token_ids and not 0 <= min(item.token_ids) <= max(item.token_ids) < 1 << 32:
                raise InvalidRequest(f"request {item.request_id!r} has ids outside 0..2**32-1")
        answers = [pb.DetokenizedText(request_id=item.request_id, stopped=True) for item in items]
        at: list[int] = []
        parts: list[_Part] = []
        for i, item in enumerate(items):
            sequence = self._sequences.get(item.request_id)
            if sequence is not None:
                start = len(sequence.token_ids)
                sequence.token_ids += item.token_ids
                parts.append(_Part(sequence, start, len(sequence.token_ids), item.end))
                at.append(i)
        for i, answer in zip(at, await self._exchange(parts) if parts else (), strict=True):
            answers[i] = answer
        return answers

    def drop(self, request_id: str) -> None:
        """Forgets a request here and there. Unknown ones are no error."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        sequence.closed = True
        if sequence.stream and not self._closed:
            end = len(sequence.token_ids)
            self._put(_Batch([_Part(sequence, end, end, True)], self._future(), forget=True))

    async def close(self) -> None:
        """Feeds that wait end with Unavailable. Twice is safe."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail(Unavailable("the stream to the tokenizer was closed"))

    async def _exchange(self, parts: list[_Part]) -> list[pb.DetokenizedText]:
        batch = _Batch(parts, self._future())
        self._put(batch)
        try:
            async with asyncio.timeout(self._feed_s):
                return await batch.reply
        except TimeoutError:
            raise Expired(
                f"no text from the tokenizer at {self._link.address} within {self._feed_s:g} s"
            ) from None

    def _future(self) -> asyncio.Future[list[pb.DetokenizedText]]:
        return asyncio.get_running_loop().create_future()

    def _put(self, batch: _Batch) -> None:
        self._waiting.append(batch)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        """Opens a stream, and another when it broke, for as long as there is something to say."""
        while True:
            await self._wake.wait()
            known, lost = await self._until_broken()
            if lost:
                self._waiting.extendleft(b for m in reversed(self._sent) for b in reversed(m))
                self._sent.clear()
                self._drop_given_up()
            else:
                self._fail(known)
            await asyncio.sleep(REOPEN_S)

    async def _until_broken(self) -> tuple[MeshError, bool]:
        """Why the stream broke, and whether another may do better."""
        try:
            await self._run_stream()
        except grpc.aio.AioRpcError as error:
            known = from_rpc(error, f"tokenizer at {self._link.address}")
            lost = isinstance(known, Unavailable) or error.code() is grpc.StatusCode.CANCELLED
            return known, lost
        except MeshError as error:
            return error, False
        except Exception as error:
            logger.exception("unexpected answer of the tokenizer")
            return MeshError(f"the stream to the tokenizer failed: {error}"), False
        return Unavailable("the tokenizer ended the stream"), True

    async def _run_stream(self) -> None:
        self._num_streams += 1
        call = self._stub.Detokenize(metadata=self._link.metadata(), wait_for_ready=True)
        writer = asyncio.create_task(self._write(call))
        try:
            async for response in call:
                self._take(response)
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            call.cancel()

    async def _write(
        self, call: "grpc.aio.StreamStreamCall[pb.DetokenizeRequest, pb.DetokenizeResponse]"
    ) -> None:
        """Sends all that waits as one message. A call that broke is noticed by its reader."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._wake.wait()
                self._wake.clear()
                batches = list(self._waiting)
                self._waiting.clear()
                if batches:
                    self._sent.append(batches)
                    items = [self._item(part) for batch in batches for part in batch.parts]
                    await call.write(pb.DetokenizeRequest(items=items))

    def _item(self, part: _Part) -> pb.DetokenizeItem:
        sequence = part.sequence
        if sequence.stream == self._num_streams:
            return pb.DetokenizeItem(
                request_id=sequence.opening.request_id,
                token_ids=sequence.token_ids[part.start : part.stop],
                end=part.end,
            )
        if sequence.closed:
            return pb.DetokenizeItem(request_id=sequence.opening.request_id, end=True)
        sequence.stream = self._num_streams
        sequence.num_repeated = sequence.num_said
        item = pb.DetokenizeItem(token_ids=sequence.token_ids[: part.stop], end=part.end)
        item.MergeFrom(sequence.opening)
        return item

    def _take(self, response: pb.DetokenizeResponse) -> None:
        answers = list(response.items)
        asked = sum(len(batch.parts) for batch in self._sent[0]) if self._sent else 0
        if asked != len(answers):
            raise MeshError(f"the tokenizer answered {len(answers)} items, was asked {asked}")
        for batch in self._sent.popleft():
            own, answers = answers[: len(batch.parts)], answers[len(batch.parts) :]
            for part, answer in zip(batch.parts, own, strict=True):
                self._count(part, answer)
            if not batch.reply.done():
                batch.reply.set_result(own)

    def _count(self, part: _Part, answer: pb.DetokenizedText) -> None:
        sequence = part.sequence
        if sequence.num_repeated:
            repeated = min(sequence.num_repeated, len(answer.text))
            sequence.num_repeated -= repeated
            answer.text = answer.text[repeated:]
        sequence.num_said += len(answer.text)
        request_id = answer.request_id
        if self._sequences.get(request_id) is not sequence:
            return
        if part.end:
            sequence.closed = True
            del self._sequences[request_id]
        elif answer.stopped or answer.HasField("error"):
            self.drop(request_id)

    def _drop_given_up(self) -> None:
        """What nobody waits for is not sent again."""
        self._waiting = deque(b for b in self._waiting if not (b.forget or b.reply.done()))
        if self._waiting:
            self._wake.set()

    def _fail(self, error: MeshError) -> None:
        for batch in (*chain.from_iterable(self._sent), *self._waiting):
            if not batch.reply.done():
                batch.reply.set_exception(error)
                batch.reply.exception()  # a dropped request's answer is awaited by nobody
        self._sent.clear()
        self._waiting.clear()
