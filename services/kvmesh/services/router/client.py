"""Calls the mesh's public service, each call once; kvmesh.client tries again on top of it."""

import copy
from collections.abc import AsyncIterator
from typing import Self

import grpc

from kvmesh.services.common.callers import AUTHORIZATION
from kvmesh.services.common.client import Deadlines, Link
from kvmesh.services.common.errors import from_rpc
from kvmesh.services.common.telemetry import inject
from kvmesh.v1 import inference_pb2 as pb
from kvmesh.v1 import inference_pb2_grpc


class InferenceClient:
    """Does not own `link`. Every call raises the MeshError that the router answered with."""

    def __init__(self, link: Link, deadlines: Deadlines | None = None) -> None:
        self._link = link
        self._deadlines = deadlines or Deadlines()
        self._stub = inference_pb2_grpc.InferenceStub(link.channel)
        self._authorization: str | None = None

    def on_behalf(self, authorization: str) -> Self:
        """The same client, as the caller who sent this: an edge has no rights of its own to lend.

        authorization: the caller's, with its scheme; empty if there was none.
        """
        other = copy.copy(self)
        other._authorization = authorization
        return other

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The caller's word for who it is, or the mesh's own; never the second for the first."""
        if self._authorization is None:
            return self._link.metadata()
        own = ((AUTHORIZATION, self._authorization),) if self._authorization else ()
        return (*own, *inject())

    async def generate(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Streams the answer; closing the iterator cancels the request in the whole mesh.

        Without `timeout_s` the router's own limit holds.
        """
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self.metadata())
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._link.address) from error
        finally:
            call.cancel()

    async def route(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> pb.RouteResponse:
        """Where the request would run, and why, without running it."""
        try:
            reply: pb.RouteResponse = await self._stub.Route(
                pb.RouteRequest(request=request),
                timeout=_least(timeout_s, self._deadlines.encode_s),
                metadata=self.metadata(),
            )
            return reply
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._link.address) from error

    async def list_models(self, timeout_s: float | None = None) -> pb.ListModelsResponse:
        try:
            reply: pb.ListModelsResponse = await self._stub.ListModels(
                pb.ListModelsRequest(),
                timeout=_least(timeout_s, self._deadlines.status_s),
                metadata=self.metadata(),
            )
            return reply
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._link.address) from error

    async def status(self, timeout_s: float | None = None) -> pb.MeshStatusResponse:
        """The members of the mesh with their load."""
        try:
            reply: pb.MeshStatusResponse = await self._stub.MeshStatus(
                pb.MeshStatusRequest(),
                timeout=_least(timeout_s, self._deadlines.status_s),
                metadata=self.metadata(),
            )
            return reply
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._link.address) from error


def _least(timeout_s: float | None, limit_s: float) -> float:
    return limit_s if timeout_s is None else min(timeout_s, limit_s)
