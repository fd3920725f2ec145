"""A process's membership: registered, renewed in the background, left on close."""

import asyncio
import contextlib
import logging

import grpc

from kvmesh.services.common.client import Deadlines, Link
from kvmesh.services.common.errors import Incompatible, from_rpc
from kvmesh.v1 import mesh_pb2, mesh_pb2_grpc

logger = logging.getLogger(__name__)

RETRY_S = 0.2  # between attempts to reach a router that is not there yet


class MembershipLease:
    """Keeps `member` in the mesh of `link` until closed, and then closes the link.

    A router that restarted or forgot us is told again; one that is away is retried for ever,
    since it is the mesh's only one. A router that refuses our block format ends the process.
    """

    def __init__(
        self, link: Link, member: mesh_pb2.Member, deadlines: Deadlines | None = None
    ) -> None:
        self._link = link
        self._member = member
        self._deadlines = deadlines or Deadlines()
        self._stub = mesh_pb2_grpc.MeshStub(link.channel)
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._draining = False
        self.inference_address = ""  # of the router's public service, once registered

    async def start(self) -> None:
        """Returns when registered. Raises Incompatible if the mesh runs another model or codec."""
        lease_s = await self._register()
        self._task = asyncio.create_task(self._keep(lease_s))

    async def drain(self) -> None:
        """Tells the router to send no new work."""
        self._draining = True
        self._wake.set()

    async def close(self) -> None:
        """Leaves the mesh. Twice is safe, and a router that is away is no error."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._leave()
        await self._link.close()

    async def _leave(self) -> None:
        request = mesh_pb2.LeaveRequest(
            member_id=self._member.member_id, incarnation=self._member.incarnation
        )
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._stub.Leave(request, timeout=1.0, metadata=self._link.metadata())

    async def _register(self) -> float:
        request = mesh_pb2.RegisterRequest(member=self._member)
        while True:
            try:
                reply = await self._stub.Register(
                    request, timeout=self._deadlines.mesh_s, metadata=self._link.metadata()
                )
                self.inference_address = reply.inference_address
                return reply.lease_ms / 1000
            except grpc.aio.AioRpcError as error:
                known = from_rpc(error, f"router at {self._link.address}")
                if isinstance(known, Incompatible):
                    raise known from error
                logger.info("cannot register yet: %s", known)
            await asyncio.sleep(RETRY_S)

    async def _keep(self, lease_s: float) -> None:
        away = False  # said once, not at every attempt
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), lease_s / 3)
            self._wake.clear()
            try:
                lease_s = await self._renew()
                away = False
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    lease_s = await self._register()
                elif not away:
                    away = True
                    logger.warning("cannot renew the lease, and keep trying: %s", error.details())

    async def _renew(self) -> float:
        request = mesh_pb2.RenewRequest(
            member_id=self._member.member_id,
            incarnation=self._member.incarnation,
            draining=self._draining,
        )
        reply = await self._stub.Renew(
            request, timeout=self._deadlines.mesh_s, metadata=self._link.metadata()
        )
        return reply.lease_ms / 1000
