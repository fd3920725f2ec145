"""The HTTP server over real sockets: limits, slow clients, malformed bytes, many mutations."""

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import pytest
from gateway_fakes import WAIT_S, FakeMesh, exchange, served

from kvmesh.services.common.config import GatewayConfig
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.security import Security
from kvmesh.services.gateway.transport import HttpListener, HttpServer


def code_of(body: bytes) -> Any:
    return json.loads(body)["error"]


GET = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"


async def test_a_plain_request() -> None:
    async with served(FakeMesh()) as address:
        assert await exchange(address, GET + b"\r\n") == (200, b'{"status":"ok"}')


async def test_large_heads_are_refused() -> None:
    async with served(FakeMesh(), max_head_bytes=2048) as address:
        one = await exchange(address, GET + b"x: " + b"y" * 3000 + b"\r\n\r\n")
        endless = await exchange(address, GET + b"x: " + b"y" * 3000)
        many = await exchange(address, GET + b"x: y\r\n" * 600 + b"\r\n")
    assert [status for status, _ in (one, endless, many)] == [431, 431, 431]
    assert code_of(one[1])["type"] == "invalid_request_error"


async def test_a_slow_head_and_a_slow_body_end() -> None:
    async with served(FakeMesh(), head_timeout_s=0.1, body_timeout_s=0.1) as address:
        assert (await exchange(address, b""))[0] == 408
        assert (await exchange(address, GET))[0] == 408
        post = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc"
        status, body = await exchange(address, post)
    assert status == 408 and "body" in code_of(body)["message"]


async def test_blank_lines_between_requests_do_not_keep_a_connection() -> None:
    async with served(FakeMesh(), head_timeout_s=0.1) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            assert b"200 OK" in await reader.readuntil(b'"ok"}')
            writer.write(b"\r\n")
            assert b" 408 " in await reader.read()
        writer.close()


async def test_a_client_that_does_not_read_is_let_go() -> None:
    mesh = FakeMesh(words=["x" * 65536] * 400)
    async with served(mesh, write_timeout_s=0.1) as address:
        _, writer = await asyncio.open_connection(*address, limit=1)
        body = json.dumps({"model": "mini", "prompt": "a", "stream": True}).encode()
        kind = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n" + kind + body)
        async with asyncio.timeout(WAIT_S):
            await mesh.closed.wait()
        writer.close()


async def test_too_many_connections() -> None:
    async with served(FakeMesh(), max_connections=1) as address:
        _, first = await asyncio.open_connection(*address)
        status, body = await exchange(address, b"")
        first.close()
    assert (status, code_of(body)["code"]) == (503, "service_unavailable")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        b"GET http://[::1 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\nabc",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GE\x00T / HTTP/1.1\r\n\r\n",
    ],
)
async def test_bytes_that_are_no_http(data: bytes) -> None:
    async with served(FakeMesh()) as address:
        status, body = await exchange(address, data)
        assert status == 400 and code_of(body)["type"] == "invalid_request_error"
        assert (await exchange(address, GET + b"\r\n"))[0] == 200


async def test_a_port_that_is_taken() -> None:
    async with served(FakeMesh()) as (host, port):
        taken = HttpListener(host, port, None, GatewayConfig()).open(Security())
        with pytest.raises(ConfigError, match=f"{port}.*gateway.port"):
            await taken.bind()


async def test_without_a_port_a_taken_default_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(FakeMesh()) as (host, port):
        monkeypatch.setattr("kvmesh.services.gateway.transport.DEFAULT_PORT", port)
        server: HttpServer = HttpListener(host, None, None, GatewayConfig()).open(Security())
        try:
            assert urlsplit(await server.bind()).port not in (None, port)
        finally:
            await server.stop(0)


async def test_the_address_of_others_needs_credentials() -> None:
    with pytest.raises(ConfigError, match="certificate"):
        HttpListener("0.0.0.0", 0, None, GatewayConfig()).open(Security())
