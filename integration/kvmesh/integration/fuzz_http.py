"""Mutated HTTP requests against a running edge: nothing may crash, hang, or answer a 5xx.

    python -m kvmesh.integration.fuzz_http http://127.0.0.1:8080 --count 20000

Each request is a valid one with a few mutations: of its JSON values, of its JSON text, or of the
bytes of the whole request. One number, the seed, makes all of them.
"""

import argparse
import asyncio
import copy
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

ANSWER_S = 60.0  # until an answer begins; beyond, the request counts as hung
IN_FLIGHT = 8
PATHS = ("/v1/chat/completions", "/v1/completions")
MEANT = frozenset({503})  # a mesh that is busy or drains says so

CHAT: dict[str, Any] = {
    "model": "mini",
    "messages": [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ],
    "max_tokens": 2,
    "temperature": 0.5,
    "stop": ["a"],
    "n": 1,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": 1},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "stream": True,
    "stream_options": {"include_usage": True},
    "seed": 1,
}
COMPLETION: dict[str, Any] = {
    "model": "mini",
    "prompt": "Hello",
    "max_tokens": 2,
    "logprobs": 1,
    "echo": False,
    "response_format": {"type": "regex", "pattern": "[a-z]+"},
    "top_k": 5,
    "min_tokens": 1,
}
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e308, -(1 << 70), 1 << 64, "", "\x00", "é" * 50, "\U0001f600",
    "\ud800", [], {}, [[]], [None], {"": {}}, ["a"] * 40, "(" * 30, "[" * 200,
    "a{1,99999}{1,99999}",
    {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"$ref": "http://x/y"},
)  # fmt: skip
TEXTS = (b"NaN", b"Infinity", b"\xff", b"{", b"}", b"]", b'"', b",", b"\\u0000", b"1e999", b"\x00")


@dataclass(slots=True)
class Tally:
    """unexpected: what was wrong, with the request's number."""

    statuses: Counter[int] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)


def mutated(seed: int, number: int) -> tuple[bytes, bool]:
    """A request, the same for the same arguments; whether its head was spared."""
    return _mutated(random.Random(f"{seed}/{number}"))


def request_bytes(body: bytes, path: str = PATHS[1]) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: edge\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def fuzz(url: str, count: int, seed: int) -> Tally:
    """Sends `count` mutated requests to the edge at `url`."""
    parts = urlsplit(url)
    tally = Tally()
    waiting = iter(range(count))

    async def send_some() -> None:
        for number in waiting:
            data, whole = mutated(seed, number)
            try:
                async with asyncio.timeout(ANSWER_S):
                    status = await _status(parts.hostname or "", parts.port or 80, data, whole)
            except TimeoutError:
                tally.unexpected.append(f"request {number} was not answered in {ANSWER_S:g} s")
                continue
            tally.statuses[status] += 1
            if status >= 500 and status not in MEANT:
                tally.unexpected.append(f"request {number} was answered {status}")

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(send_some())
    return tally


async def _status(host: str, port: int, data: bytes, whole: bool) -> int:
    """0: closed without an answer, which a request cut short may be.

    Leaves when the answer has begun: a mutation may have asked for thousands of tokens.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(data)
        if not whole:
            writer.write_eof()  # a request that lost its end is over all the same
        answer = await reader.read(1 << 16)
    except ConnectionError:
        return 0
    finally:
        writer.close()
    first = answer.split(b"\r\n", 1)[0].split(b" ")
    return int(first[1]) if len(first) > 1 and first[1].isdigit() else 0


def _mutated(rng: random.Random) -> tuple[bytes, bool]:
    path = rng.choice(PATHS)
    value: Any = json.loads(json.dumps(CHAT if path == PATHS[0] else COMPLETION))
    kind = rng.randrange(10)
    if kind < 6:
        for _ in range(rng.randint(1, 3)):
            _mutate_value(rng, value)
    body = json.dumps(value).encode()
    if kind in (6, 7):
        body = _mutate_bytes(rng, body, TEXTS)
    data = request_bytes(body, path)
    if kind == 8:
        head, _, rest = data.partition(b"\r\n\r\n")
        data = _mutate_bytes(rng, head, (b"\r\n", b"\x00", b":", b"\xff", b"999999")) + b"\r\n\r\n"
        data += rest
    return data, kind != 8


def _mutate_value(rng: random.Random, value: dict[str, Any]) -> None:
    """Changes, removes or adds one field, at a random depth."""
    at: Any = value
    while True:
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.6:
            at = at[key]
            continue
        break
    act = rng.randrange(4)
    if act == 0:
        del at[key]
    elif act == 1 and isinstance(at, dict):
        at[rng.choice(("x", "", "stop", "n", "tools", "user", "\x00"))] = _odd(rng)
    else:
        at[key] = _odd(rng)


def _odd(rng: random.Random) -> Any:
    """A copy, since a later mutation may change it in place."""
    return copy.deepcopy(rng.choice(ODD))


def _mutate_bytes(rng: random.Random, data: bytes, pieces: tuple[bytes, ...]) -> bytes:
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        end = place + rng.randrange(3)
        data = data[:place] + rng.choice((b"", *pieces)) + data[end:]
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("url", help="of the edge, as 'kvmesh up' shows it")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    tally = asyncio.run(fuzz(options.url.removesuffix("/v1"), options.count, options.seed))
    print(json.dumps({"seed": options.seed, "statuses": dict(sorted(tally.statuses.items()))}))
    for line in tally.unexpected[:20]:
        print(line, file=sys.stderr)
    sys.exit(bool(tally.unexpected))


if __name__ == "__main__":
    main()
