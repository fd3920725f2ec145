"""The router's process: the public service on one address, membership on another."""

import asyncio
import time
from collections.abc import Sequence

import grpc

from kvmesh.services.common.callers import load_callers
from kvmesh.services.common.client import MAX_PUBLIC_MESSAGE_BYTES, Deadlines
from kvmesh.services.common.process import MESH_PORT_VARIABLE, ProcessContext, listen_port
from kvmesh.services.common.server import Listener
from kvmesh.services.router.admission import Admission
from kvmesh.services.router.core import RouterCore
from kvmesh.services.router.fleet import Fleet
from kvmesh.services.router.membership import Membership
from kvmesh.services.router.metrics import show_router
from kvmesh.services.router.parts import RouterParts
from kvmesh.services.router.request_metrics import RequestMetrics
from kvmesh.services.router.servicer import InferenceServicer, MeshServicer, OwnEntry
from kvmesh.v1 import inference_pb2_grpc, mesh_pb2_grpc


class RouterService:
    """Listens at once, so that others can join; ready when a worker and a tokenizer are there."""

    def __init__(self, context: ProcessContext) -> None:
        config = context.config.router
        core = RouterCore(config)
        self._context = context
        self._fleet = Fleet(Membership(config.lease_s), core, context.security, Deadlines())
        self.parts = RouterParts(
            config=config,
            core=core,
            admission=Admission(config.max_active, config.max_waiting_s),
            fleet=self._fleet,
            telemetry=context.telemetry,
            metrics=RequestMetrics(context.meters),
            callers=load_callers(context.security.token, context.config.security, context.meters),
        )
        show_router(context.meters, self.parts)
        own = OwnEntry(context.member_id, "", context.incarnation, time.monotonic())
        self._inference = InferenceServicer(self.parts, own)
        self._expiry: asyncio.Task[None] | None = None

    @property
    def listeners(self) -> Sequence[Listener]:
        config = self._context.config
        return (
            Listener(
                config.host,
                listen_port(config.router.port),
                ("kvmesh.v1.Inference",),
                mutual=False,
                max_message_bytes=MAX_PUBLIC_MESSAGE_BYTES,
                callers=self.parts.callers,
            ),
            Listener(
                config.host,
                listen_port(config.router.mesh_port, MESH_PORT_VARIABLE),
                ("kvmesh.v1.Mesh",),
            ),
        )

    def register(self, listeners: Sequence[grpc.aio.Server]) -> None:
        public, mesh = listeners
        inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, public)
        mesh_pb2_grpc.add_MeshServicer_to_server(MeshServicer(self.parts, self._inference), mesh)

    async def start(self, addresses: Sequence[str]) -> None:
        """Returns when a worker, whose probe token came before it joined, and a tokenizer are in.

        Until then membership works, and requests are refused as Unavailable.
        """
        own = self._inference.own
        self._inference.own = OwnEntry(own.member_id, addresses[0], own.incarnation, own.started)
        self._expiry = asyncio.create_task(self._expire(), name="lease expiry")
        while not self._fleet.ready:
            await self._fleet.wait_changed()

    async def drain(self) -> None:
        self.parts.draining = True
        if self.parts.admission.active:
            await self.parts.idle.wait()

    async def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
            self._expiry = None
        await self._fleet.close()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(self._context.config.router.lease_s / 8)
            self._fleet.expire(self.parts.clock())
