"""The gateway's process: its edges listen, it finds the router and joins the mesh."""

import asyncio
import logging
from collections.abc import Sequence

import grpc
from starlette.types import ASGIApp, Receive, Scope, Send

from kvmesh.oip import inference_pb2_grpc
from kvmesh.services.common.callers import load_callers
from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.client import MAX_PUBLIC_MESSAGE_BYTES, Link
from kvmesh.services.common.errors import MeshError, Unavailable
from kvmesh.services.common.lease import MembershipLease
from kvmesh.services.common.process import MESH_PORT_VARIABLE, ProcessContext, listen_port
from kvmesh.services.common.server import Listener, Openable
from kvmesh.services.gateway.app import Edge, make_app
from kvmesh.services.gateway.errors import from_mesh
from kvmesh.services.gateway.many import EdgeMesh, ManyStream
from kvmesh.services.gateway.metrics import EdgeMetrics, show_edge
from kvmesh.services.gateway.oip.servicer import SERVICE, OipServicer
from kvmesh.services.gateway.transport import Connections, HttpListener
from kvmesh.services.gateway.vocabulary import Vocabulary, open_vocabulary
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import inference_pb2, mesh_pb2

logger = logging.getLogger(__name__)

KIND = "gateway"
OIP_PORT = 8001  # what clients of the Open Inference Protocol expect
OIP_SCHEME = "oip://"
RETRY_S = 0.1  # between questions to a router that is not ready yet
POLL_S = 0.02  # between looks at whether the last answer is out


class Door:
    """The app of the listener: 503 until the edge behind it is open."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is None:
            error = from_mesh(Unavailable("the mesh is still starting"))
            error.headers["connection"] = "close"  # the body is not read
            await error.response()(scope, receive, send)
            return
        self.active += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.active -= 1


class GatewayService:
    """Implements common.server.Service, over HTTP and with the Open Inference Protocol.

    Raises ConfigError for a broken tokenizer.
    """

    def __init__(self, context: ProcessContext) -> None:
        self._context = context
        self._door = Door()
        self._callers = load_callers(
            context.security.token, context.config.security, context.meters
        )
        self._oip = OipServicer()
        self._connections = Connections()
        self._edge: Edge | None = None
        self._link: Link | None = None
        self._many: ManyStream | None = None
        self._lease: MembershipLease | None = None
        self._vocabulary: Vocabulary = open_vocabulary(checkpoint_path(context.config.model))

    @property
    def listeners(self) -> Sequence[Openable]:
        config = self._context.config
        files = config.security
        certificate = (str(files.cert), str(files.key)) if files.cert and files.key else None
        port = listen_port(config.gateway.port)
        http = HttpListener(
            config.host, port, self._door, config.gateway, certificate, self._connections
        )
        return (http, self._oip_listener()) if config.gateway.oip else (http,)

    def _oip_listener(self) -> Listener:
        config = self._context.config
        port = listen_port(config.gateway.oip_port, MESH_PORT_VARIABLE)
        return Listener(
            config.host,
            OIP_PORT if port is None else port,
            (SERVICE,),
            mutual=False,
            max_message_bytes=MAX_PUBLIC_MESSAGE_BYTES,
            or_any=port is None,
            callers=self._callers,
        )

    def register(self, listeners: Sequence[grpc.aio.Server]) -> None:
        for server in listeners:
            inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._oip, server)

    async def start(self, addresses: Sequence[str]) -> None:
        """Joins, and opens the door when the router knows a model that it can run."""
        context = self._context
        model = inference_pb2.ModelInfo(name=context.config.model.name)
        member = mesh_pb2.Member(
            member_id=context.member_id, incarnation=context.incarnation, kind=KIND,
            address=addresses[0], model=model,
            other_addresses=[f"{OIP_SCHEME}{address}" for address in addresses[1:]],
        )  # fmt: skip
        self._lease = MembershipLease(Link(context.mesh_address, context.security), member)
        await self._lease.start()
        self._link = Link(self._lease.inference_address, context.security)
        mesh = InferenceClient(self._link)
        self._many = ManyStream(self._link)
        found = await self._wait_model(mesh)
        metrics = EdgeMetrics(context.meters)
        show_edge(context.meters, metrics, lambda: self._connections.open)
        self._edge = Edge(
            mesh=EdgeMesh(mesh, self._many),
            vocabulary=self._vocabulary,
            telemetry=context.telemetry,
            config=context.config.gateway,
            peer=self._link.address,
            callers=self._callers,
            metrics=metrics,
            fingerprint=f"fp_{found.format.fingerprint.hex()[:12]}_{found.format.codec}",
        )
        self._door.app = make_app(self._edge)
        self._oip.edge = self._edge

    async def drain(self) -> None:
        if self._lease is not None:
            await self._lease.drain()
        if self._edge is not None:
            self._edge.draining = True
        while self._door.active or self._oip.active:
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        if self._lease is not None:
            await self._lease.close()
        if self._many is not None:
            await self._many.close()
        if self._link is not None:
            await self._link.close()

    async def _wait_model(self, mesh: InferenceClient) -> inference_pb2.ModelInfo:
        while True:
            try:
                models = (await mesh.list_models()).models
                if models:
                    return models[0]
            except MeshError as error:
                logger.info("the router does not answer yet: %s", error)
            await asyncio.sleep(RETRY_S)
