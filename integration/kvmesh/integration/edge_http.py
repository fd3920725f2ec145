"""A client of the HTTP edge as light as HTTP/1.1 allows: what it costs is not the edge's cost."""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvmesh.integration.loadgen import RequestResult

REQUEST_S = 60.0
LAST_CHUNK = b"0\r\n\r\n"
TAIL_BYTES = 1024  # of an answer that are kept: the usage is in its last event
USAGE = re.compile(rb'"completion_tokens":(\d+)')

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def completion_body(model: str, ids: Sequence[int], salt: str, output_tokens: int) -> bytes:
    """A streamed, greedy completion of exactly so many tokens. ids: the prompt's tokens."""
    fields = {
        "model": model,
        "prompt": ids,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": salt,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields).encode()


def send(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: edge\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )


@dataclass(slots=True)
class EdgeConnections:
    """Connections to one edge that stay open from one round to the next."""

    url: str
    _open: list[Connection] = field(default_factory=list)

    async def connect(self) -> Connection:
        """A new one, which is the caller's to close."""
        parts = urlsplit(self.url)
        return await asyncio.open_connection(parts.hostname or "", parts.port or 80)

    async def complete(
        self, bodies: Sequence[bytes], arrivals_s: Sequence[float]
    ) -> list[RequestResult]:
        """Sends each at its time, seconds from now, on a connection of its own. Raises
        TimeoutError."""
        while len(self._open) < len(bodies):
            self._open.append(await self.connect())
        start = time.perf_counter()
        due = zip(self._open, bodies, arrivals_s, strict=False)
        async with asyncio.timeout(REQUEST_S):
            return await asyncio.gather(
                *(_complete(*one, body, start + arrival_s) for one, body, arrival_s in due)
            )

    def close(self) -> None:
        for _, writer in self._open:
            writer.close()
        self._open.clear()


async def _complete(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, begin: float
) -> RequestResult:
    """One streamed completion; the connection is ready for the next one after it. begin: when it
    is due, on time.perf_counter."""
    result = RequestResult(begin_s=begin)
    await asyncio.sleep(begin - time.perf_counter())
    send(writer, body)
    head, data = b"", b""
    while not data.endswith(LAST_CHUNK):
        part = await reader.read(1 << 16)
        if not part:
            result.error = "the edge closed the connection"
            return result
        if not head:
            data += part
            if b"\r\n\r\n" in data:
                head, _, data = data.partition(b"\r\n\r\n")
        else:
            data = (data + part)[-TAIL_BYTES:]
        if head and data and not result.ttft_s:
            result.ttft_s = time.perf_counter() - begin
    result.duration_s = time.perf_counter() - begin
    found = USAGE.search(data)
    if b" 200 " not in head[:16] or found is None:
        result.error = f"{head[:40].decode()}: no usage came"
        return result
    result.usage.completion_tokens = int(found[1])
    return result
