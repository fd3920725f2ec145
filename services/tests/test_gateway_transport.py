"""The HTTP server over real sockets: limits, slow clients, malformed bytes, many mutations."""

import asyncio
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest
from gateway_fakes import WAIT_S, FakeMesh, edge_of, exchange, served
from scraping import one, scraped
from starlette.types import Receive, Scope, Send

from kvmesh.services.common.callers import Callers
from kvmesh.services.common.config import GatewayConfig
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.metrics import Meters
from kvmesh.services.common.security import Security
from kvmesh.services.gateway.app import make_app
from kvmesh.services.gateway.metrics import EdgeMetrics, show_edge
from kvmesh.services.gateway.service import Door
from kvmesh.services.gateway.transport import Connections, HttpListener, HttpServer, _bind


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


async def test_a_caller_without_a_key_is_not_read_from() -> None:
    """The refusal comes before the body, and closes: a body in drops would hold a connection."""
    async with served(FakeMesh(), Callers("s3cret")) as address:
        post = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\nabc"
        status, body = await exchange(address, post)
    assert (status, code_of(body)["code"]) == (401, "invalid_api_key")


async def test_an_edge_that_starts_is_not_read_from() -> None:
    server = HttpListener("127.0.0.1", 0, Door(), GatewayConfig()).open(Security())
    try:
        parts = urlsplit(await server.bind())
        assert parts.hostname and parts.port
        post = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\nabc"
        status, body = await exchange((parts.hostname, parts.port), post)
    finally:
        await server.stop(0)
    assert (status, code_of(body)["code"]) == (503, "service_unavailable")


async def test_metrics_of_the_edge() -> None:
    meters, connections = Meters("gateway", "gateway"), Connections()
    edge = edge_of(FakeMesh())
    edge.metrics = EdgeMetrics(meters)
    show_edge(meters, edge.metrics, lambda: connections.open)
    listener = HttpListener("127.0.0.1", 0, make_app(edge), edge.config, connections=connections)
    server = listener.open(Security())
    try:
        parts = urlsplit(await server.bind())
        assert parts.hostname and parts.port
        address = parts.hostname, parts.port
        await exchange(address, b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        await exchange(address, b"MADE-UP /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        _, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(WAIT_S):
            while not connections.open:
                await asyncio.sleep(0)
        found = await asyncio.to_thread(scraped, meters.serve(0))
        writer.close()
    finally:
        meters.close()
        await server.stop(0)
    count = "http_server_request_duration_seconds_count"
    labels = {"http_route": "/v1/models", "http_response_status_code": "200"}
    assert one(found, count, **labels, http_request_method="GET") == 1
    assert sum(value for _, value in found[count]) == 1  # what is no HTTP is no request
    assert one(found, "kvmesh_gateway_first_byte_seconds_count", **labels) == 1
    assert one(found, "http_server_active_requests") == 0
    assert one(found, "kvmesh_gateway_connections") == 1


async def test_blank_lines_between_requests_do_not_keep_a_connection() -> None:
    async with served(FakeMesh(), head_timeout_s=0.1) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        async with asyncio.timeout(WAIT_S):
            assert b"200 OK" in await reader.readuntil(b'"ok"}')
            writer.write(b"\r\n")
            assert b" 408 " in await reader.read()
        writer.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_does_not_read_is_let_go(stream: bool) -> None:
    """Its request ends, and so does its connection, with what it has not taken."""
    mesh, connections = FakeMesh(words=["x" * 65536] * 400), Connections()
    async with served(mesh, connections=connections, write_timeout_s=0.1) as address:
        body = json.dumps({"model": "mini", "prompt": "a", "stream": stream}).encode()
        kind = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        with socket.create_connection(address) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n" + kind + body)
            async with asyncio.timeout(WAIT_S):
                await mesh.closed.wait()
                while connections.open:
                    await asyncio.sleep(0.01)


async def test_the_end_of_an_answer_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left fits the transport's buffer, so nothing waits for it but the close."""
    connections = Connections()

    def bind(host: str, port: int | None) -> socket.socket:
        """The system keeps next to nothing for the client."""
        sock = _bind(host, port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr("kvmesh.services.gateway.transport._bind", bind)
    edge = edge_of(FakeMesh(), write_timeout_s=0.1)

    async def some(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"50000"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * 50_000})

    listener = HttpListener("127.0.0.1", 0, some, edge.config, connections=connections)
    server = listener.open(Security())
    try:
        parts = urlsplit(await server.bind())
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.connect((parts.hostname, parts.port))
            sock.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            async with asyncio.timeout(WAIT_S):
                while not connections.open:
                    await asyncio.sleep(0.01)
                while connections.open:
                    await asyncio.sleep(0.01)
    finally:
        await server.stop(0)


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
