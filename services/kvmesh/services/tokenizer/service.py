"""The tokenizer's process: bound, probed, a member of the mesh."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import grpc

from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.client import Deadlines, Link
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.lease import MembershipLease
from kvmesh.services.common.process import ProcessContext, listen_port
from kvmesh.services.common.server import Listener
from kvmesh.services.tokenizer.client import TokenizerClient
from kvmesh.services.tokenizer.core import CodecLimits, load_codec
from kvmesh.services.tokenizer.metrics import show_tokenizer
from kvmesh.services.tokenizer.servicer import TokenizerServicer
from kvmesh.v1 import inference_pb2, mesh_pb2, tokenizer_pb2_grpc

SERVICE_NAME = "kvmesh.v1.Tokenizer"
PROBE_TEXT = "The capital of France is Paris, 42."


class TokenizerService:
    """Serves the tokenizer of the mesh's model. Raises ConfigError if its files are not usable."""

    def __init__(self, context: ProcessContext) -> None:
        config = context.config
        limits = CodecLimits(config.tokenizer.max_text_bytes, config.tokenizer.cache_bytes)
        self._context = context
        self._codec = load_codec(
            checkpoint_path(config.model), limits, threading.Lock(), datetime.now
        )
        self._executor = ThreadPoolExecutor(config.tokenizer.threads, "tokenizer")
        self._servicer = TokenizerServicer(self._codec, self._executor, context.telemetry)
        show_tokenizer(context.meters, self._servicer)
        self._lease: MembershipLease | None = None

    @property
    def listeners(self) -> Sequence[Listener]:
        config = self._context.config
        port = listen_port(config.tokenizer.port)
        return (Listener(config.host, port, (SERVICE_NAME,)),)

    def register(self, listeners: Sequence[grpc.aio.Server]) -> None:
        tokenizer_pb2_grpc.add_TokenizerServicer_to_server(self._servicer, listeners[0])

    async def start(self, addresses: Sequence[str]) -> None:
        """Probes its own address, then joins the mesh."""
        await self._probe(addresses[0])
        context = self._context
        member = mesh_pb2.Member(
            member_id=context.member_id,
            incarnation=context.incarnation,
            kind="tokenizer",
            address=addresses[0],
            model=inference_pb2.ModelInfo(
                name=context.config.model.name, vocab_size=self._codec.vocab_size
            ),
        )
        self._lease = MembershipLease(Link(context.mesh_address, context.security), member)
        await self._lease.start()

    async def drain(self) -> None:
        if self._lease is not None:
            await self._lease.drain()
        await self._servicer.drain()

    async def close(self) -> None:
        if self._lease is not None:
            await self._lease.close()
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    async def _probe(self, address: str) -> None:
        async with Link(address, self._context.security) as link:
            client = TokenizerClient(link, Deadlines())
            encoded = await client.encode(PROBE_TEXT)
            text = await client.decode(encoded.token_ids)
        if not encoded.token_ids or not text:
            raise ConfigError(
                f"the tokenizer of model {self._context.config.model.name!r} does not work: "
                f"{PROBE_TEXT!r} became {len(encoded.token_ids)} ids and then {text!r}"
            )
