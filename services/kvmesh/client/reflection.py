"""Calls any gRPC server by what it says of itself: server reflection, JSON in and out."""

from collections.abc import Generator, Iterable, Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2 as pb

# Both versions carry the same bytes; servers have one or the other.
METHODS = (
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)

Metadata = tuple[tuple[str, str], ...]


class ReflectionError(Exception):
    """The server does not say what was asked for; the message names it and what there is."""


class ReflectedServer:
    """A server behind `channel`, which this does not own.

    timeout_s: of each call. Calls raise grpc.RpcError.
    """

    def __init__(self, channel: grpc.Channel, metadata: Metadata, timeout_s: float) -> None:
        self._channel = channel
        self._metadata = metadata
        self._timeout_s = timeout_s
        self._pool = descriptor_pool.DescriptorPool()
        self._files: set[str] = set()
        self._reflect = ""  # which of METHODS the server has

    def services(self) -> list[str]:
        """Full names, in order."""
        (reply,) = self._ask([pb.ServerReflectionRequest(list_services="*")])
        return sorted(service.name for service in reply.list_services_response.service)

    def find(self, name: str) -> ServiceDescriptor | MethodDescriptor | Descriptor:
        """A service, method ('pkg.Service/Method', or with a dot) or message.

        Raises ReflectionError for what the server does not have.
        """
        symbol = name.replace("/", ".").strip(".")
        # Not every server knows methods as symbols, but each knows what they are in.
        if not (self._load(symbol) or self._load(symbol.rpartition(".")[0])):
            services = ", ".join(self.services())
            raise ReflectionError(f"the server has no {symbol!r}; its services: {services}")
        finders = (
            self._pool.FindServiceByName,
            self._pool.FindMethodByName,
            self._pool.FindMessageTypeByName,
        )
        for find in finders:
            try:
                return find(symbol)
            except KeyError:
                continue
        raise ReflectionError(f"the server has no service, method or message {symbol!r}")

    def method(self, name: str) -> MethodDescriptor:
        """Raises ReflectionError for what is no method, naming those of a service."""
        found = self.find(name)
        if isinstance(found, MethodDescriptor):
            return found
        if isinstance(found, ServiceDescriptor):
            methods = ", ".join(method.name for method in found.methods)
            raise ReflectionError(f"{name} is a service; call one of its methods: {methods}")
        raise ReflectionError(f"{name} is a message, not a method")

    def parse(self, method: MethodDescriptor, record: Any) -> Message:
        """A request from plain values. Raises ReflectionError naming the field that is wrong."""
        message = message_factory.GetMessageClass(method.input_type)()
        try:
            if not isinstance(record, dict):
                raise TypeError(f"{record!r} is no JSON object")
            return json_format.ParseDict(record, message, descriptor_pool=self._pool)
        except (json_format.ParseError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ReflectionError(f"no {method.input_type.full_name}: {reason}") from error

    def plain(self, message: Message) -> dict[str, Any]:
        """A message as JSON has it, with the field names of the proto."""
        return json_format.MessageToDict(
            message, preserving_proto_field_name=True, descriptor_pool=self._pool
        )

    def call(
        self, method: MethodDescriptor, requests: Iterable[Message]
    ) -> Generator[Message, None, None]:
        """The responses as they come. Raises ReflectionError if it takes one request, not more."""
        given = list(requests)
        if not method.client_streaming and len(given) != 1:
            raise ReflectionError(f"{method.full_name} takes one request, {len(given)} are given")
        kind = ("unary", "stream")
        make = getattr(
            self._channel, f"{kind[method.client_streaming]}_{kind[method.server_streaming]}"
        )
        path = f"/{method.containing_service.full_name}/{method.name}"
        invoke = make(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        # A future, or a stream: both can be cancelled.
        start = invoke if method.server_streaming else invoke.future
        call = start(
            iter(given) if method.client_streaming else given[0],
            timeout=self._timeout_s,
            metadata=self._metadata,
        )
        try:
            if method.server_streaming:
                yield from call
            else:
                yield call.result()
        finally:
            call.cancel()

    def _load(self, symbol: str) -> bool:
        """Puts the file of a symbol, and all that it imports, into the pool; False if unknown."""
        (reply,) = self._ask([pb.ServerReflectionRequest(file_containing_symbol=symbol)])
        if reply.HasField("error_response"):
            return False
        known = {proto.name: proto for proto in _files(reply)}
        wanted = list(known)
        while wanted:
            missing = [
                name
                for proto in (known[file] for file in wanted)
                for name in proto.dependency
                if name not in known and name not in self._files
            ]
            wanted = list(dict.fromkeys(missing))
            asked = [pb.ServerReflectionRequest(file_by_filename=name) for name in wanted]
            for answer in self._ask(asked):
                if answer.HasField("error_response"):
                    raise ReflectionError(
                        f"the server misses a file: {answer.error_response.error_message}"
                    )
                known.update((proto.name, proto) for proto in _files(answer))
        for name in list(known):
            self._add(name, known)
        return True

    def _add(self, name: str, known: dict[str, descriptor_pb2.FileDescriptorProto]) -> None:
        """Imports first, since the pool refuses a file whose imports it lacks."""
        if name in self._files:
            return
        self._files.add(name)
        for dependency in known[name].dependency:
            self._add(dependency, known)
        self._pool.Add(known[name])

    def _ask(self, requests: list[pb.ServerReflectionRequest]) -> list[pb.ServerReflectionResponse]:
        """One answer per request. Raises ReflectionError if the server has no reflection."""
        if not requests:
            return []
        for path in (self._reflect,) if self._reflect else METHODS:
            try:
                answers = self._stream(path, requests)
            except grpc.RpcError as error:
                if _code(error) is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
                continue
            self._reflect = path
            return answers
        raise ReflectionError("the server has no reflection, so it cannot be asked what it serves")

    def _stream(
        self, path: str, requests: list[pb.ServerReflectionRequest]
    ) -> list[pb.ServerReflectionResponse]:
        invoke: Any = self._channel.stream_stream(
            path,
            request_serializer=pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=pb.ServerReflectionResponse.FromString,
        )
        call = invoke(iter(requests), timeout=self._timeout_s, metadata=self._metadata)
        return list(call)


def _files(
    answer: pb.ServerReflectionResponse,
) -> Iterator[descriptor_pb2.FileDescriptorProto]:
    for data in answer.file_descriptor_response.file_descriptor_proto:
        yield descriptor_pb2.FileDescriptorProto.FromString(data)


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    assert isinstance(error, grpc.Call)  # what the library raises is both
    code: grpc.StatusCode = error.code()
    return code
