"""Text for all requests: one open stream per tokenizer, and one message on it per step.

While a message is under way new ids gather, and go out together as the next one. When a tokenizer
leaves, its requests go on with another one, or with the next to join: all their ids so far are sent
again, and the text that was said already is dropped from the answer.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmesh.services.common.client import Deadlines, Link
from kvmesh.services.common.errors import Expired, MeshError, Unavailable, from_status
from kvmesh.services.common.sampling import SamplingSettings
from kvmesh.services.tokenizer.client import DetokenizeStream, NewTokens, TokenizerClient
from kvmesh.v1 import inference_pb2, mesh_pb2, tokenizer_pb2

logger = logging.getLogger(__name__)

RETRY_S = 0.1  # after a stream that failed


@dataclass(frozen=True, slots=True)
class Text:
    """New text of one request.

    num_tokens: output ids consumed by then. stopped: a stop string was met. final: no more comes.
    """

    text: str
    num_tokens: int
    stopped: bool
    final: bool
    error: MeshError | None = None


class Speech:
    """One request's output as text. `ids` is the request's own list, which only grows."""

    def __init__(
        self,
        request_id: str,
        settings: SamplingSettings,
        ids: Sequence[int],
        deliver: Callable[[Text], None],
    ) -> None:
        self.request_id = request_id
        self.ending = False  # no more ids follow
        self.closed = False  # the last text has come, or nobody wants it
        self._settings = settings
        self._ids = ids
        self._deliver = deliver
        self._fed = 0
        self._opened = False  # the present stream knows this request
        self._said = 0  # characters
        self._skip = 0  # characters of a repeated answer that were said before

    def restart(self) -> None:
        """Another stream goes on: it has to be told all ids from the first."""
        self._fed = 0
        self._opened = False
        self._skip = self._said

    def next_item(self, stream: DetokenizeStream) -> NewTokens | None:
        """What the stream has yet to be told; None if nothing."""
        if self.closed:
            stream.drop(self.request_id)
            return None
        if self._fed == len(self._ids) and not self.ending:
            return None
        if not self._opened:
            settings = self._settings
            stream.open(
                self.request_id,
                settings.stop,
                settings.include_stop,
                settings.keep_special_tokens,
            )
            self._opened = True
        start, self._fed = self._fed, len(self._ids)
        return NewTokens(self.request_id, self._ids[start:], self.ending)

    def answered(self, item: NewTokens, said: tokenizer_pb2.DetokenizedText) -> None:
        """Delivers what is new in the stream's answer to `item`."""
        if self.closed:
            return
        error = from_status(said.error.code, said.error.message) if said.HasField("error") else None
        self.closed = said.stopped or item.end or error is not None
        text = said.text
        if self._skip:
            cut = min(self._skip, len(text))
            self._skip -= cut
            text = text[cut:]
        self._said += len(text)
        self._deliver(Text(text, said.num_tokens, said.stopped, self.closed, error))


class TokenizerLink:
    """One life of a tokenizer: its open stream and the requests on it."""

    def __init__(self, member: mesh_pb2.Member, link: Link, deadlines: Deadlines) -> None:
        self.member_id = member.member_id
        self.client = TokenizerClient(link, deadlines)
        self.speeches: dict[str, Speech] = {}
        self.encoding = 0
        self._stream = DetokenizeStream(link)
        self._dirty: dict[str, Speech] = {}
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"text {member.member_id}")

    @property
    def load(self) -> tuple[int, str]:
        return len(self.speeches) + self.encoding, self.member_id

    def say(self, speech: Speech) -> None:
        """There are new ids, or an end, of `speech`."""
        self.speeches[speech.request_id] = speech
        self._dirty[speech.request_id] = speech
        self._wake.set()

    def stop(self) -> None:
        """Delivers nothing from now on."""
        self._task.cancel()

    async def close(self) -> None:
        self.stop()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._stream.close()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._step()
            except MeshError as error:
                logger.warning("no text from %s: %s", self.member_id, error)
                await asyncio.sleep(RETRY_S)
                for speech in list(self.speeches.values()):
                    self._stream.drop(speech.request_id)
                    speech.restart()
                    self.say(speech)

    async def _step(self) -> None:
        dirty, self._dirty = self._dirty, {}
        sent: list[tuple[Speech, NewTokens]] = []
        for speech in dirty.values():
            item = speech.next_item(self._stream)
            if item is not None:
                sent.append((speech, item))
            elif speech.closed:
                self.speeches.pop(speech.request_id, None)
        if not sent:
            return
        answers = await self._stream.feed([item for _, item in sent])
        for (speech, item), said in zip(sent, answers, strict=True):
            speech.answered(item, said)


class TokenizerPool:
    """The mesh's tokenizers. A request's text comes from one of them, the least busy at first."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._links: dict[str, TokenizerLink] = {}
        self._homes: dict[str, TokenizerLink] = {}
        self._homeless: dict[str, Speech] = {}

    def __len__(self) -> int:
        return len(self._links)

    def add(self, member: mesh_pb2.Member, link: Link) -> None:
        self._links[member.member_id] = TokenizerLink(member, link, self._deadlines)
        homeless, self._homeless = self._homeless, {}
        for speech in homeless.values():
            self.say(speech)

    def remove(self, member_id: str) -> TokenizerLink | None:
        """Its requests go on elsewhere, or wait for a tokenizer to join. The caller closes it."""
        link = self._links.pop(member_id, None)
        if link is None:
            return None
        link.stop()
        for speech in link.speeches.values():
            self._homes.pop(speech.request_id, None)
            speech.restart()
            if not speech.closed:
                self.say(speech)
        return link

    async def encode(self, prompt: str | inference_pb2.ChatPrompt, salt: str = "") -> list[int]:
        """salt: of the cache of prefixes; another one's are not found there.

        Raises the tokenizer's MeshError; asks another one if the first is not there.
        """
        last: MeshError = Unavailable("no tokenizer is in the mesh")
        for link in sorted(self._links.values(), key=_load):
            link.encoding += 1
            try:
                return list((await link.client.encode(prompt, salt)).token_ids)
            except (Unavailable, Expired) as error:
                last = error
            finally:
                link.encoding -= 1
        raise last

    def say(self, speech: Speech) -> None:
        """There are new ids, or an end, of `speech`; its text is delivered as it comes."""
        link = self._homes.get(speech.request_id)
        if link is None:
            if not self._links:
                self._homeless[speech.request_id] = speech
                return
            link = self._homes[speech.request_id] = min(self._links.values(), key=_load)
        link.say(speech)

    def release(self, speech: Speech) -> None:
        """Nobody wants more of its text."""
        link = self._homes.pop(speech.request_id, None)
        self._homeless.pop(speech.request_id, None)
        speech.closed = True
        if link is not None:
            link.say(speech)

    async def close(self) -> None:
        for member_id in list(self._links):
            link = self.remove(member_id)
            if link is not None:
                await link.close()


def _load(link: TokenizerLink) -> tuple[int, str]:
    return link.load
