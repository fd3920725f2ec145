"""The router's two services over gRPC: the public one, and membership."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from kvmesh.services.common.errors import Forbidden
from kvmesh.services.common.telemetry import extract
from kvmesh.services.router.generation import Asked, Generation
from kvmesh.services.router.many import ManySession
from kvmesh.services.router.membership import Lease
from kvmesh.services.router.parts import RouterParts, prepare_request
from kvmesh.v1 import inference_pb2 as pb
from kvmesh.v1 import inference_pb2_grpc, mesh_pb2, mesh_pb2_grpc


@dataclass(frozen=True, slots=True)
class OwnEntry:
    """How the router shows itself in the mesh's status. started: on the parts' clock."""

    member_id: str
    address: str
    incarnation: int
    started: float


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """What users call."""

    def __init__(self, parts: RouterParts, own: OwnEntry) -> None:
        self._parts = parts
        self.own = own

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        metadata = context.invocation_metadata()
        asked = Asked(self._parts.callers.identify(metadata), request, extract(metadata))
        generation = Generation(self._parts, asked, self._timeout_s(context))
        async with aclosing(generation.run()) as responses:  # type: ignore[type-var]
            async for response in responses:
                yield response

    async def GenerateMany(
        self, request_iterator: AsyncIterator[pb.GenerateBatch], context: Any
    ) -> AsyncIterator[pb.SaidBatch]:
        session = ManySession(self._parts, self._parts.config.request_timeout_s)
        reader = asyncio.create_task(session.read(request_iterator))
        try:
            while (batch := await session.next()) is not None:
                yield batch
            reader.result()  # raises what was wrong with the edge's messages
        finally:
            reader.cancel()
            await session.close()
            await asyncio.gather(reader, return_exceptions=True)

    async def Route(self, request: pb.RouteRequest, context: Any) -> pb.RouteResponse:
        tenant = self._parts.callers.identify(context.invocation_metadata())
        prepared = await prepare_request(
            self._parts, request.request, tenant, self._timeout_s(context)
        )
        query = prepared.query([], handover=True)
        decision = self._parts.core.choose(query, self._parts.clock())
        return pb.RouteResponse(
            candidates=[candidate.to_proto() for candidate in decision.candidates],
            prompt_tokens=query.prompt_tokens,
            prompt_blocks=len(query.keys),
            reason=decision.reason,
        )

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        known = self._parts.fleet.membership.model
        if known is None:
            return pb.ListModelsResponse()
        model = pb.ModelInfo()
        model.CopyFrom(known)
        model.max_context = self._parts.fleet.max_context()
        return pb.ListModelsResponse(models=[model])

    async def MeshStatus(
        self, request: pb.MeshStatusRequest, context: Any
    ) -> pb.MeshStatusResponse:
        parts = self._parts
        if parts.callers.identify(context.invocation_metadata()) is not None:
            raise Forbidden("what runs in the mesh is for its operator, who has the mesh's token")
        now = parts.clock()
        leases = parts.fleet.membership.leases()
        return pb.MeshStatusResponse(
            members=[self._own_status(), *(self._member(lease, now) for lease in leases)],
            requests_total=parts.admission.total,
            requests_active=parts.admission.active,
            migrations_total=parts.migrations,
            rejected_total=parts.admission.rejected,
            index_bytes=parts.core.index.num_bytes,
            uptime_s=now - self.own.started,
        )

    def _timeout_s(self, context: Any) -> float:
        limit: float = self._parts.config.request_timeout_s
        left: float | None = context.time_remaining()
        return limit if left is None else min(limit, left)

    def _own_status(self) -> pb.MemberStatus:
        ready = "serving" if self._parts.fleet.ready else "connecting"
        return pb.MemberStatus(
            member_id=self.own.member_id,
            kind="router",
            address=self.own.address,
            incarnation=self.own.incarnation,
            running=self._parts.admission.active,
            indexed_blocks=self._parts.core.index.entries,
            state="draining" if self._parts.draining else ready,
        )

    def _member(self, lease: Lease, now: float) -> pb.MemberStatus:
        member = lease.member
        status = pb.MemberStatus(
            member_id=member.member_id,
            kind=member.kind,
            role=member.role,
            address=member.address,
            other_addresses=member.other_addresses,
            incarnation=member.incarnation,
            lease_left_s=max(0.0, lease.expires - now),
            device=member.device,
            simulated=member.simulated,
            devices=member.devices,
            price_usd_h=member.price_usd_h,
            price_source=member.price_source,
            indexed_blocks=self._parts.core.index.blocks_of(member.member_id),
            state="draining" if lease.draining else "serving",
        )
        worker = self._parts.core.workers.get(member.member_id)
        if worker is not None:
            report = worker.report
            status.state = worker.state
            status.running = report.running
            status.waiting = report.waiting
            status.blocks_total = report.blocks_total
            status.blocks_free = report.blocks_free
        return status


class MeshServicer(mesh_pb2_grpc.MeshServicer):
    """What the mesh's own processes call."""

    def __init__(self, parts: RouterParts, inference: InferenceServicer) -> None:
        self._parts = parts
        self._inference = inference

    @property
    def _lease_ms(self) -> int:
        return round(self._parts.fleet.membership.lease_s * 1000)

    async def Register(
        self, request: mesh_pb2.RegisterRequest, context: Any
    ) -> mesh_pb2.RegisterResponse:
        self._parts.fleet.register(request.member, self._parts.clock())
        return mesh_pb2.RegisterResponse(
            lease_ms=self._lease_ms, inference_address=self._inference.own.address
        )

    async def Renew(self, request: mesh_pb2.RenewRequest, context: Any) -> mesh_pb2.RenewResponse:
        self._parts.fleet.renew(request, self._parts.clock())
        return mesh_pb2.RenewResponse(lease_ms=self._lease_ms)

    async def Leave(self, request: mesh_pb2.LeaveRequest, context: Any) -> mesh_pb2.LeaveResponse:
        self._parts.fleet.leave(request)
        return mesh_pb2.LeaveResponse()

    async def ListMembers(
        self, request: mesh_pb2.ListMembersRequest, context: Any
    ) -> mesh_pb2.ListMembersResponse:
        leases = self._parts.fleet.membership.leases(request.kind)
        return mesh_pb2.ListMembersResponse(members=[lease.member for lease in leases])
