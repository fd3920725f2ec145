"""The synchronous client; any number of threads may share one."""

import random
import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from kvmesh.client.answer import Answer
from kvmesh.client.retry import TIMEOUT_S, Attempts, Retry
from kvmesh.services.common.client import CHANNEL_OPTIONS, call_metadata
from kvmesh.services.common.errors import MeshError, from_rpc
from kvmesh.services.common.security import Security
from kvmesh.v1 import inference_pb2 as pb
from kvmesh.v1 import inference_pb2_grpc

T = TypeVar("T")


class Client:
    """A mesh at `address` (host:port of its router). Close it, or use it with `with`.

    All calls raise the MeshError that the mesh answered with, Expired after `timeout_s` seconds.
    """

    def __init__(
        self,
        address: str,
        credentials: Security | None = None,
        retry: Retry | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._address = address
        self._security = credentials or Security()
        self._retry = retry or Retry()
        self._timeout_s = timeout_s
        tls = self._security.channel_credentials()
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, tls, options=CHANNEL_OPTIONS)
        channel: Any = self._channel  # the stub takes both kinds; its types know asyncio's only
        self._stub: Any = inference_pb2_grpc.InferenceStub(channel)

    def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> Generator[pb.GenerateResponse, None, None]:
        """The answer as it comes; the last response has finish_reason and usage.

        Closing the iterator, or dropping it, cancels the request in the whole mesh.
        """
        attempts = self._attempts(timeout_s)
        begun = False
        while True:
            try:
                for response in self._generate(request, attempts.left_s(time.monotonic())):
                    begun = True
                    yield response
                return
            except grpc.RpcError as failure:
                error = self._known(failure)
                if begun:
                    raise error from failure
                self._pause(attempts, error)

    def generate(self, request: pb.GenerateRequest, timeout_s: float | None = None) -> Answer:
        """The whole answer."""
        return Answer.of(self.stream(request, timeout_s))

    def route(
        self, request: pb.GenerateRequest, timeout_s: float | None = None
    ) -> pb.RouteResponse:
        """Where the request would run, and every term of that choice, without running it."""
        wanted = pb.RouteRequest(request=request)
        reply: pb.RouteResponse = self._call(
            lambda left_s: self._stub.Route(wanted, timeout=left_s, metadata=self._metadata()),
            timeout_s,
        )
        return reply

    def models(self, timeout_s: float | None = None) -> list[pb.ModelInfo]:
        """The models that the mesh serves."""
        wanted = pb.ListModelsRequest()
        reply: pb.ListModelsResponse = self._call(
            lambda left_s: self._stub.ListModels(wanted, timeout=left_s, metadata=self._metadata()),
            timeout_s,
        )
        return list(reply.models)

    def status(self, timeout_s: float | None = None) -> pb.MeshStatusResponse:
        """The members of the mesh with their load."""
        wanted = pb.MeshStatusRequest()
        reply: pb.MeshStatusResponse = self._call(
            lambda left_s: self._stub.MeshStatus(wanted, timeout=left_s, metadata=self._metadata()),
            timeout_s,
        )
        return reply

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _generate(
        self, request: pb.GenerateRequest, left_s: float
    ) -> Iterator[pb.GenerateResponse]:
        call = self._stub.Generate(request, timeout=left_s, metadata=self._metadata())
        try:
            yield from call
        finally:
            call.cancel()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return call_metadata(self._security)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        return Attempts(self._retry, seconds, time.monotonic())

    def _call(self, call: Callable[[float], T], timeout_s: float | None) -> T:
        attempts = self._attempts(timeout_s)
        while True:
            try:
                return call(attempts.left_s(time.monotonic()))
            except grpc.RpcError as failure:
                self._pause(attempts, self._known(failure))

    def _known(self, failure: grpc.RpcError) -> MeshError:
        assert isinstance(failure, grpc.Call)  # what the library raises is both
        return from_rpc(failure, self._address)

    def _pause(self, attempts: Attempts, error: MeshError) -> None:
        time.sleep(attempts.pause_s(error, time.monotonic(), random.random()))
