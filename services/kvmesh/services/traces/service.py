"""The trace receiver's process: OTLP over gRPC on loopback, into the span store."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from kvmesh.services.common.config import TelemetryConfig
from kvmesh.services.common.process import listen_port
from kvmesh.services.common.server import Listener
from kvmesh.services.traces.inbox import Inbox
from kvmesh.services.traces.store import Limits

SERVICE_NAME = "opentelemetry.proto.collector.trace.v1.TraceService"
STORE_FILE = "traces.sqlite"
LOOPBACK = "127.0.0.1"  # whatever the mesh's own host: spans are for this machine's people
MAX_REQUEST_BYTES = 8 << 20


class TraceReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Answers as soon as the spans wait in memory; what finds no room is reported as rejected."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    async def Export(self, request: Any, context: Any) -> Any:
        response = trace_service_pb2.ExportTraceServiceResponse()
        rejected = self._inbox.offer(request)
        if rejected:
            response.partial_success.rejected_spans = rejected
            response.partial_success.error_message = "the span store is behind"
        return response


class TracesService:
    """Not a member of the mesh: it knows no router, and no request waits for it."""

    def __init__(self, config: TelemetryConfig, run_dir: Path) -> None:
        self._config = config
        limits = Limits(config.traces_max_bytes, config.traces_max_age_s)
        self._inbox = Inbox(run_dir / STORE_FILE, limits)

    @property
    def listeners(self) -> Sequence[Listener]:
        port = listen_port(self._config.traces_port)
        name = (SERVICE_NAME,)
        return (Listener(LOOPBACK, port, name, max_message_bytes=MAX_REQUEST_BYTES),)

    def register(self, listeners: Sequence[grpc.aio.Server]) -> None:
        receiver = TraceReceiver(self._inbox)
        add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add(receiver, listeners[0])

    async def start(self, addresses: Sequence[str]) -> None:
        self._inbox.start()

    async def drain(self) -> None:
        """Nothing to wait for: close() stores what has come."""

    async def close(self) -> None:
        await asyncio.to_thread(self._inbox.close)
