"""The shard as a process: probe, registration, fixed port, drain, leave."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.services.common.client import Deadlines, Links
from kvmesh.services.common.config import KvCacheConfig, MeshConfig
from kvmesh.services.common.errors import ConfigError, Unauthenticated
from kvmesh.services.common.process import ProcessContext
from kvmesh.services.common.security import Security
from kvmesh.services.common.server import BoundServer, Listener, serve
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.services.kvcache import service
from kvmesh.services.kvcache.client import KvCacheClient
from kvmesh.services.kvcache.service import KvCacheService
from kvmesh.v1 import mesh_pb2, mesh_pb2_grpc

TIMEOUT = 20.0


class RecordingMesh(mesh_pb2_grpc.MeshServicer):
    def __init__(self) -> None:
        self.members: list[mesh_pb2.Member] = []
        self.drained = False
        self.left: list[str] = []

    async def Register(self, request, context):  # type: ignore[no-untyped-def]
        self.members.append(request.member)
        return mesh_pb2.RegisterResponse(lease_ms=60_000)

    async def Renew(self, request, context):  # type: ignore[no-untyped-def]
        self.drained |= request.draining
        return mesh_pb2.RenewResponse(lease_ms=60_000)

    async def Leave(self, request, context):  # type: ignore[no-untyped-def]
        self.left.append(request.member_id)
        return mesh_pb2.LeaveResponse()

    async def ListMembers(self, request, context):  # type: ignore[no-untyped-def]
        return mesh_pb2.ListMembersResponse()


@asynccontextmanager
async def router() -> AsyncIterator[tuple[RecordingMesh, str]]:
    recording = RecordingMesh()
    bound = BoundServer(Listener("127.0.0.1", 0, ("kvmesh.v1.Mesh",)), Security())
    mesh_pb2_grpc.add_MeshServicer_to_server(recording, bound.server)
    address = await bound.bind()
    try:
        yield recording, address
    finally:
        await bound.stop(0)


def context_for(mesh_address: str, telemetry: Telemetry) -> ProcessContext:
    config = MeshConfig(kvcache=KvCacheConfig(max_bytes=3 << 20))
    return ProcessContext(config, "kvcache-3", mesh_address, Security(), telemetry, 42)


async def test_life_of_the_process() -> None:
    telemetry = Telemetry("kvcache", "kvcache-3")
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with router() as (recording, mesh_address):
        service = KvCacheService(context_for(mesh_address, telemetry))
        process = asyncio.create_task(
            serve(service, Security(), lambda found: ready.set_result(found[0]), stop)
        )
        waiting: set[asyncio.Future[Any]] = {process, ready}
        await asyncio.wait(waiting, timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        address = ready.result()
        (member,) = recording.members
        assert (member.member_id, member.incarnation, member.kind) == ("kvcache-3", 42, "kvcache")
        assert member.address == address
        links = Links()
        stats = await KvCacheClient(links, Deadlines()).stats(address)
        assert (stats.member_id, stats.incarnation) == ("kvcache-3", 42)
        assert stats.bytes_budget == 3 << 20
        stub: Any = health_pb2_grpc.HealthStub(links.to(address).channel)
        health = await stub.Check(health_pb2.HealthCheckRequest(service="kvmesh.v1.KvCache"))
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        await links.close()
        stop.set()
        await asyncio.wait_for(process, TIMEOUT)
        assert recording.left == ["kvcache-3"]
    telemetry.close()


async def test_a_failed_start_can_be_closed() -> None:
    telemetry = Telemetry("kvcache", "kvcache-3")
    service = KvCacheService(context_for("127.0.0.1:1", telemetry))
    await service.close()
    await service.close()
    telemetry.close()


def test_a_restarted_process_keeps_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = Telemetry("kvcache", "kvcache-3")
    context = context_for("127.0.0.1:1", telemetry)
    assert KvCacheService(context).listeners[0].port == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("KVMESH_PORT", str(port))
    assert KvCacheService(context).listeners[0].port == port
    for wrong in ("65536", "-1", "x", ""):
        monkeypatch.setenv("KVMESH_PORT", wrong)
        with pytest.raises(ConfigError, match="KVMESH_PORT is"):
            KvCacheService(context)
    telemetry.close()


async def test_probe_uses_the_given_credentials() -> None:
    """With a token on the server and none on the probe, the shard must not come up."""
    telemetry = Telemetry("kvcache", "kvcache-3")
    service = KvCacheService(context_for("127.0.0.1:1", telemetry))
    bound = BoundServer(service.listeners[0], Security(token="secret"))
    service.register([bound.server])
    address = await bound.bind()
    try:
        with pytest.raises(Unauthenticated, match="bearer token"):
            await asyncio.wait_for(service.start([address]), TIMEOUT)
    finally:
        await service.close()
        await bound.stop(0)
        telemetry.close()


@pytest.mark.parametrize(("limit", "slots"), [(None, 4), (2 << 20, 2), (64 << 20, 4)])
def test_a_shard_on_a_gpu_takes_its_share_of_the_budget(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, slots: int
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(service, "unavailable_reason", lambda: None)
    monkeypatch.setattr(service, "CupyDevice", lambda: None)
    monkeypatch.setattr(service, "DeviceMemory", lambda device, size: taken.append(size >> 20))
    service.open_memory(KvCacheConfig(backend="cuda", max_bytes=4 << 20, device_bytes=limit))
    assert taken == [slots]


def test_a_shard_without_its_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "unavailable_reason", lambda: "no GPU is here; install one")
    with pytest.raises(ConfigError, match=r"kvcache.backend = 'cuda': no GPU is here; install one"):
        service.open_memory(KvCacheConfig(backend="cuda"))
