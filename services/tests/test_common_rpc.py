"""Errors, tokens, TLS and health over real gRPC on a random port."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
import trustme
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.services.common.client import Link
from kvmesh.services.common.errors import (
    ConfigError,
    InvalidRequest,
    MeshError,
    NotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
    from_rpc,
)
from kvmesh.services.common.security import Security
from kvmesh.services.common.server import METADATA_BYTES, Listener, serve
from kvmesh.v1 import mesh_pb2, mesh_pb2_grpc


class ScriptedMesh(mesh_pb2_grpc.MeshServicer):
    """Raises what `member_id` names, so that a test sees each error's way through gRPC."""

    async def Register(self, request, context):  # type: ignore[no-untyped-def]
        errors: dict[str, Exception] = {
            "invalid": InvalidRequest("temperature -1, must be >= 0"),
            "missing": NotFound("no model 'x'"),
            "full": Overloaded("queue holds 256 of 256", retry_after_s=0.25),
            "bug": ZeroDivisionError("secret internals"),
        }
        if request.member.member_id in errors:
            raise errors[request.member.member_id]
        return mesh_pb2.RegisterResponse(lease_ms=1000)

    async def Renew(self, request, context):  # type: ignore[no-untyped-def]
        return mesh_pb2.RenewResponse(lease_ms=1000)

    async def Leave(self, request, context):  # type: ignore[no-untyped-def]
        return mesh_pb2.LeaveResponse()

    async def ListMembers(self, request, context):  # type: ignore[no-untyped-def]
        return mesh_pb2.ListMembersResponse()


class ScriptedService:
    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.listeners = (Listener(host, port, ("kvmesh.v1.Mesh",)),)
        self.calls: list[str] = []

    def register(self, listeners: Sequence[grpc.aio.Server]) -> None:
        mesh_pb2_grpc.add_MeshServicer_to_server(ScriptedMesh(), listeners[0])

    async def start(self, addresses: Sequence[str]) -> None:
        self.calls.append("start")

    async def drain(self) -> None:
        self.calls.append("drain")

    async def close(self) -> None:
        self.calls.append("close")


@asynccontextmanager
async def running(service: ScriptedService, security: Security) -> AsyncIterator[str]:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(
        serve(service, security, lambda addresses: ready.set_result(addresses[0]), stop)
    )
    try:
        done, _ = await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            task.result()
        yield ready.result()
    finally:
        stop.set()
        with suppress(ConfigError):
            await task


async def register(link: Link, member_id: str) -> mesh_pb2.RegisterResponse:
    request = mesh_pb2.RegisterRequest(member=mesh_pb2.Member(member_id=member_id))
    try:
        return await mesh_pb2_grpc.MeshStub(link.channel).Register(
            request, timeout=5, metadata=link.metadata()
        )
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, "peer") from error


async def test_each_error_arrives_as_its_own_class() -> None:
    service = ScriptedService()
    async with running(service, Security()) as address, Link(address) as link:
        assert (await register(link, "fine")).lease_ms == 1000
        with pytest.raises(InvalidRequest, match="temperature -1, must be >= 0"):
            await register(link, "invalid")
        with pytest.raises(NotFound, match="no model 'x'"):
            await register(link, "missing")
        with pytest.raises(Overloaded) as full:
            await register(link, "full")
        assert full.value.retry_after_s == 0.25
        with pytest.raises(MeshError) as bug:
            await register(link, "bug")
        assert type(bug.value) is MeshError
        assert "secret" not in str(bug.value)
    assert service.calls == ["start", "drain", "close"]


async def test_retry_delay_is_also_in_the_status_details() -> None:
    async with running(ScriptedService(), Security()) as address, Link(address) as link:
        call = mesh_pb2_grpc.MeshStub(link.channel).Register(
            mesh_pb2.RegisterRequest(member=mesh_pb2.Member(member_id="full")), timeout=5
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    trailers = {str(key): value for key, value in caught.value.trailing_metadata() or ()}
    raw = trailers["grpc-status-details-bin"]
    assert isinstance(raw, bytes)
    info = RetryInfo()
    assert Status.FromString(raw).details[0].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 250


@pytest.mark.parametrize("data", [b"\x0a\x03\x0a\x01\xff", b"\xff\xff\xff", b"\x0a\x7f"])
async def test_bytes_that_do_not_parse_are_the_callers_fault(data: bytes) -> None:
    async with running(ScriptedService(), Security()) as address, Link(address) as link:
        raw = link.channel.unary_unary("/kvmesh.v1.Mesh/Register")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(data, timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await register(link, "fine")).lease_ms == 1000


async def test_unknown_fields_are_ignored() -> None:
    async with running(ScriptedService(), Security()) as address, Link(address) as link:
        raw = link.channel.unary_unary("/kvmesh.v1.Mesh/Register")
        assert await raw(b"\xfa\x3f\x03abc", timeout=5)


async def test_health_and_reflection_answer() -> None:
    async with running(ScriptedService(), Security()) as address, Link(address) as link:
        health = health_pb2_grpc.HealthStub(link.channel)
        reply = await health.Check(health_pb2.HealthCheckRequest(service="kvmesh.v1.Mesh"))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_token_is_required_but_not_by_health() -> None:
    guarded = Security(token="s3cret")
    async with running(ScriptedService(), guarded) as address:
        async with Link(address) as stranger:
            with pytest.raises(Unauthenticated):
                await register(stranger, "fine")
            health = health_pb2_grpc.HealthStub(stranger.channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
        async with Link(address, guarded) as friend:
            assert (await register(friend, "fine")).lease_ms == 1000


async def test_a_port_in_use_is_named() -> None:
    async with running(ScriptedService(), Security()) as address:
        port = int(address.rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            async with running(ScriptedService(port=port), Security()):
                pass


async def test_an_open_address_without_tls_refuses_to_start() -> None:
    with pytest.raises(ConfigError, match=r"address 0\.0\.0\.0 .* needs a certificate"):
        async with running(ScriptedService(host="0.0.0.0"), Security()):
            pass


def issue(directory: Path) -> tuple[Security, Security]:
    """Credentials of a member of the mesh, and of a stranger with another authority."""
    made = []
    for name in ("mesh", "stranger"):
        authority = trustme.CA()
        cert = authority.issue_cert("127.0.0.1", "localhost")
        made.append(
            Security(
                cert=cert.cert_chain_pems[0].bytes(),
                key=cert.private_key_pem.bytes(),
                ca=authority.cert_pem.bytes(),
                token=name,
            )
        )
    return made[0], made[1]


async def test_mutual_tls_between_services(tmp_path: Path) -> None:
    member, stranger = issue(tmp_path)
    async with running(ScriptedService(), member) as address:
        async with Link(address, member) as link:
            assert (await register(link, "fine")).lease_ms == 1000
        no_cert = Security(ca=member.ca, token=member.token)
        for other in (no_cert, Security(stranger.cert, stranger.key, member.ca, member.token)):
            async with Link(address, other) as link:
                with pytest.raises(MeshError):
                    await register(link, "fine")


async def test_large_metadata_is_refused_and_the_rest_goes_on() -> None:
    async with running(ScriptedService(), Security()) as address, Link(address) as link:
        stub = mesh_pb2_grpc.MeshStub(link.channel)
        large = (("x-large", "y" * (METADATA_BYTES + 1)),)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListMembers(mesh_pb2.ListMembersRequest(), metadata=large, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await register(link, "fine")).lease_ms == 1000


async def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmesh.services.common.server.HANDSHAKE_MS", 200)
    async with running(ScriptedService(), Security()) as address:
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        writer.write(b"PRI * HTTP/2.0")
        async with asyncio.timeout(10.0):
            await reader.read()  # to its end
        writer.close()
        async with Link(address) as link:
            assert (await register(link, "fine")).lease_ms == 1000


async def test_a_write_that_fails_as_the_call_ends_says_to_try_again() -> None:
    """grpc.aio then has a status of its own in place of the call's."""
    async with Link("127.0.0.1:1") as link:
        call = link.channel.stream_stream("/kvmesh.v1.Tokenizer/Detokenize")(wait_for_ready=True)
        call._cython_call.set_internal_error("what grpc.aio does when a message cannot be sent")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    known = from_rpc(caught.value, "tokenizer")
    assert isinstance(known, Unavailable) and "while a message was written" in str(known)


@asynccontextmanager
async def slow_to_answer(address: str, delay_s: float) -> AsyncIterator[str]:
    """A way to `address` whose first byte back comes late, as of a busy or a far peer."""
    ways: set[asyncio.Task[None]] = set()

    async def pump(
        source: asyncio.StreamReader, target: asyncio.StreamWriter, wait_s: float
    ) -> None:
        while data := await source.read(1 << 16):
            await asyncio.sleep(wait_s)
            wait_s = 0.0
            target.write(data)
            await target.drain()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*address.rsplit(":", 1))
        try:
            await asyncio.gather(pump(reader, back, 0.0), pump(there, writer, delay_s))
        finally:
            for end in (back, writer):
                end.close()
                with suppress(OSError):
                    await end.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ways.add(asyncio.create_task(carry(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def test_a_peer_may_take_its_time_to_connect() -> None:
    """Else on a busy machine, or over a long line, a call fails that would have gone through."""
    async with (
        running(ScriptedService(), Security()) as address,
        slow_to_answer(address, 0.4) as slow,
        Link(slow) as link,
    ):
        assert (await register(link, "ok")).lease_ms == 1000
