"""Whether an address serves, by the standard health service."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.services.common.client import Link
from kvmesh.services.common.security import Security

POLL_S = 0.1
PROBE_S = 3.0


async def is_serving(link: Link) -> bool:
    """One probe; an address that does not answer does not serve."""
    stub: Any = health_pb2_grpc.HealthStub(link.channel)
    try:
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def wait_serving(address: str, security: Security) -> None:
    """Returns when `address` serves; bound it with asyncio.timeout."""
    async with Link(address, security) as link:
        while not await is_serving(link):
            await asyncio.sleep(POLL_S)
