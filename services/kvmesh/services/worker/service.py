"""A worker process: the model, the engine, the RPC service and the membership, in their order."""

import asyncio
import logging
from collections.abc import Callable, Sequence

import grpc

from kvmesh.backends.base import Model, ModelOptions, Simulation
from kvmesh.backends.errors import BackendError, CheckpointError
from kvmesh.backends.registry import open_model
from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.client import Deadlines, Link, Links
from kvmesh.services.common.codec_choice import check_path, choose_codec, find_check
from kvmesh.services.common.config import MeshConfig, WorkerConfig
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.lease import MembershipLease
from kvmesh.services.common.process import ProcessContext, listen_port
from kvmesh.services.common.server import Listener
from kvmesh.services.worker.constraint import Grammars, open_grammars
from kvmesh.services.worker.hub import Hub
from kvmesh.services.worker.limits import Limits
from kvmesh.services.worker.messages import model_info
from kvmesh.services.worker.metrics import show_worker
from kvmesh.services.worker.probe import probe
from kvmesh.services.worker.servicer import WorkerServicer
from kvmesh.services.worker.transfer import Transfer
from kvmesh.v1 import mesh_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE_NAME = "kvmesh.v1.Worker"
KIND = "worker"

Opener = Callable[[MeshConfig, WorkerConfig], Model]


def worker_config(config: MeshConfig, member_id: str) -> WorkerConfig:
    """The table of worker-N, which counts over all [[workers]] tables.

    Raises ConfigError if there is no such worker.
    """
    tables = [table for table in config.workers for _ in range(table.count)]
    for number, table in enumerate(tables):
        if member_id == f"worker-{number}":
            return table
    raise ConfigError(
        f"no worker is named {member_id!r}; this mesh has worker-0 to worker-{len(tables) - 1}"
    )


def open_configured(config: MeshConfig, worker: WorkerConfig) -> Model:
    """Opens the mesh's model on this worker's device; takes seconds.

    Raises ConfigError or BackendError; a codec check of another model is among these.
    """
    choice = choose_codec(config.model, find_check(config.model))
    if choice.warning:
        logger.warning("%s", choice.warning)
    options = ModelOptions(
        codec=choice.codec,
        layer_codecs=choice.layer_codecs,
        num_blocks=worker.blocks,
        num_slots=worker.slots,
        max_step_tokens=worker.step_tokens,
        threads=worker.threads,
        spin=worker.spin,
        simulation=Simulation(**worker.simulate.model_dump()),
    )
    try:
        model = open_model(worker.backend, checkpoint_path(config.model), options)
    except CheckpointError as error:
        if choice.rests_on is None:
            raise
        raise CheckpointError(f"{error}; codecs are from {check_path(config.model)}") from error
    try:
        choice.confirm(model.spec.layout.fingerprint, check_path(config.model))
    except CheckpointError:
        model.close()
        raise
    return model


def limits_of(worker: WorkerConfig, model: Model) -> Limits:
    """What the configuration and the opened model allow an engine."""
    return Limits(
        slots=min(worker.slots, model.pool.num_slots),
        num_blocks=model.pool.num_blocks,
        max_context=model.spec.max_context,
        max_waiting=worker.max_waiting,
        step_tokens=worker.step_tokens,
        prefill_chunk=worker.prefill_chunk,
    )


def price_of(worker: WorkerConfig, model: Model) -> tuple[float, str]:
    """(US dollars of one device and hour, where that is from); (0, "") if nothing says it."""
    if worker.price_usd_per_hour is not None:
        return worker.price_usd_per_hour, "mesh configuration"
    return model.device.price_per_hour, model.device.price_source


def _open_grammars(config: MeshConfig, model: Model) -> Grammars | None:
    """None, and a warning, if the model's tokenizer cannot be used for output constraints."""
    try:
        spec = model.spec
        return open_grammars(checkpoint_path(config.model), spec.vocab_size, spec.eos_token_ids)
    except ConfigError as error:
        logger.warning("requests with an output constraint will be refused: %s", error)
        return None


class WorkerService:
    """Implements common.server.Service. opener: for models that no backend's name stands for."""

    def __init__(self, context: ProcessContext, opener: Opener = open_configured) -> None:
        self._context = context
        self._worker = worker_config(context.config, context.member_id)
        self._opener = opener
        self._deadlines = Deadlines()
        self._links = Links(context.security)
        self._model: Model | None = None
        self._transfer: Transfer | None = None
        self._hub: Hub | None = None
        self._lease: MembershipLease | None = None
        self._servicer = WorkerServicer(context.member_id, self._worker.role)

    @property
    def hub(self) -> Hub:
        """Raises RuntimeError before `start`."""
        if self._hub is None:
            raise RuntimeError("the worker has not been started")
        return self._hub

    @property
    def listeners(self) -> Sequence[Listener]:
        port = listen_port(self._worker.port)
        return (Listener(self._context.config.host, port, (SERVICE_NAME,)),)

    def register(self, listeners: Sequence[grpc.aio.Server]) -> None:
        (server,) = listeners
        worker_pb2_grpc.add_WorkerServicer_to_server(self._servicer, server)

    async def start(self, addresses: Sequence[str]) -> None:
        """Opens the model, generates a probe token, then joins the mesh if there is one."""
        config, context = self._context.config, self._context
        try:
            model = await asyncio.to_thread(self._opener, config, self._worker)
            grammars = await asyncio.to_thread(_open_grammars, config, model)
        except BackendError as error:  # trying again would not mend a checkpoint or a machine
            raise ConfigError(str(error)) from error
        self._model = model
        self._transfer = Transfer(
            self._links,
            self._deadlines,
            config.kvcache.replicas,
            model.spec.layout,
            context.telemetry,
        )
        limits = limits_of(self._worker, model)
        hub = Hub(model, limits, self._transfer, context.telemetry, context.incarnation)
        self._hub = hub
        show_worker(context.meters, hub, self._transfer)
        hub.grammars = grammars
        hub.start()
        await probe(hub)
        self._servicer.serve(hub, model.device)
        self._servicer.probed = True
        if context.mesh_address:
            await self._join(model, hub, addresses[0])

    async def drain(self) -> None:
        if self._lease is not None:
            await self._lease.drain()
        await self.hub.drain()

    async def close(self) -> None:
        if self._lease is not None:
            await self._lease.close()
        if self._hub is not None:
            await self._hub.close()
        if self._transfer is not None:
            await self._transfer.close()
        await self._links.close()
        if self._model is not None:
            self._model.close()

    async def _join(self, model: Model, hub: Hub, address: str) -> None:
        price_usd_h, price_source = price_of(self._worker, model)
        member = mesh_pb2.Member(
            member_id=self._context.member_id,
            incarnation=self._context.incarnation,
            kind=KIND,
            role=self._worker.role,
            address=address,
            model=model_info(model.spec, hub.limits.max_tokens),
            device=model.device.name,
            simulated=model.device.simulated,
            devices=model.device.count,
            price_usd_h=price_usd_h,
            price_source=price_source,
            transfer_base_s=model.device.transfer_base_s,
            transfer_byte_s=model.device.transfer_byte_s,
        )
        link = Link(self._context.mesh_address, self._context.security)
        self._lease = MembershipLease(link, member, self._deadlines)
        await self._lease.start()
