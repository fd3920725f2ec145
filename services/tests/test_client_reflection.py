"""Calls by reflection, against servers with either version of it and with none."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha import reflection_pb2 as pb

from kvmesh.client.reflection import METHODS, ReflectedServer, ReflectionError
from kvmesh.v1 import kvcache_pb2, kvcache_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc

TOKENIZER = "kvmesh.v1.Tokenizer"
WAIT_S = 20.0


class Echo(tokenizer_pb2_grpc.TokenizerServicer):
    """Answers each method's kind from what it was sent."""

    def Encode(self, request: Any, context: Any) -> tokenizer_pb2.EncodeResponse:
        header = dict(context.invocation_metadata()).get("x-length", "0")
        return tokenizer_pb2.EncodeResponse(token_ids=[len(request.text), int(header)])

    def Detokenize(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        for request in request_iterator:
            items = [tokenizer_pb2.DetokenizedText(request_id=i.request_id) for i in request.items]
            yield tokenizer_pb2.DetokenizeResponse(items=items)

    def Decode(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.DATA_LOSS, "no such text")


class Keeper(kvcache_pb2_grpc.KvCacheServicer):
    """The kinds that a tokenizer does not have: stream to one, one to stream."""

    def Put(self, request_iterator: Any, context: Any) -> kvcache_pb2.PutResponse:
        return kvcache_pb2.PutResponse(stored=sum(len(r.data) for r in request_iterator))

    def Get(self, request: Any, context: Any) -> Iterator[kvcache_pb2.GetResponse]:
        for key in request.keys:
            yield kvcache_pb2.GetResponse(key=key)


class OneFileAtATime(reflection.ReflectionServicer):
    """Leaves out what a file imports, as servers of other languages do."""

    def ServerReflectionInfo(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        for answer in super().ServerReflectionInfo(request_iterator, context):
            if answer.HasField("file_descriptor_response"):
                del answer.file_descriptor_response.file_descriptor_proto[1:]
            yield answer


def enable_v1(server: grpc.Server, servicer: Any) -> None:
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=pb.ServerReflectionRequest.FromString,
        response_serializer=pb.ServerReflectionResponse.SerializeToString,
    )
    service, method = METHODS[0].strip("/").split("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )


@contextmanager
def serving(kind: str) -> Iterator[ReflectedServer]:
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        tokenizer_pb2_grpc.add_TokenizerServicer_to_server(Echo(), server)
        kvcache_pb2_grpc.add_KvCacheServicer_to_server(Keeper(), server)
        names = (TOKENIZER, "kvmesh.v1.KvCache")
        if kind == "v1alpha":
            reflection.enable_server_reflection(names, server)
        elif kind == "v1":
            enable_v1(server, OneFileAtATime(names))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield ReflectedServer(channel, (("x-length", "7"),), WAIT_S)
        finally:
            server.stop(0).wait()


@pytest.fixture(params=["v1alpha", "v1"])
def server(request: pytest.FixtureRequest) -> Iterator[ReflectedServer]:
    with serving(request.param) as reflected:
        yield reflected


def answers(server: ReflectedServer, name: str, *records: Any) -> list[Any]:
    method = server.method(name)
    messages = [server.parse(method, record) for record in records]
    return [server.plain(response) for response in server.call(method, messages)]


def test_reflection_lists_services_and_methods(server):
    assert set(server.services()) == {TOKENIZER, "kvmesh.v1.KvCache"}
    assert [m.name for m in server.find(TOKENIZER).methods] == ["Encode", "Decode", "Detokenize"]
    fields = server.find("kvmesh.v1.EncodeRequest").fields
    assert [field.name for field in fields] == ["text", "chat", "cache_salt"]


def test_reflection_calls_all_four_kinds_of_method(server):
    assert answers(server, f"{TOKENIZER}/Encode", {"text": "abc"}) == [{"token_ids": [3, 7]}]
    requests = [{"items": [{"request_id": "a"}]}, {"items": [{"request_id": "b"}]}]
    assert answers(server, f"{TOKENIZER}.Detokenize", *requests) == requests
    puts = [{"data": "AAAA"}, {"data": "AAAAAAAA"}]  # 3 and 6 bytes
    assert answers(server, "kvmesh.v1.KvCache/Put", *puts) == [{"stored": 9}]
    keys = {"keys": ["AAAA", "BBBB"]}
    assert answers(server, "kvmesh.v1.KvCache/Get", keys) == [{"key": "AAAA"}, {"key": "BBBB"}]


def test_reflection_types_are_the_servers_not_ours(server):
    """What was asked for must come from the server: the default pool stays out of it."""
    default: Any = descriptor_pool.Default().FindMessageTypeByName("kvmesh.v1.EncodeRequest")
    assert server.find("kvmesh.v1.EncodeRequest") is not default
    described = descriptor_pb2.DescriptorProto()
    server.find("kvmesh.v1.EncodeRequest").CopyToProto(described)
    assert [field.name for field in described.field] == ["text", "chat", "cache_salt"]


def test_reflection_status_of_a_failed_call(server):
    with pytest.raises(grpc.RpcError) as caught:
        answers(server, f"{TOKENIZER}/Decode", {})
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS


@pytest.mark.parametrize(
    ("name", "records", "words"),
    [
        ("no.Such/Thing", [{}], f"no 'no.Such.Thing'; its services: .*{TOKENIZER}"),
        (f"{TOKENIZER}/Nope", [{}], "'kvmesh.v1.Tokenizer.Nope'"),
        (TOKENIZER, [{}], "call one of its methods: Encode, Decode, Detokenize"),
        ("kvmesh.v1.EncodeRequest", [{}], "is a message, not a method"),
        (f"{TOKENIZER}/Encode", [{"txt": 1}], 'no field named "txt"'),
        (f"{TOKENIZER}/Encode", [[]], "no kvmesh.v1.EncodeRequest"),
        (f"{TOKENIZER}/Encode", [{}, {}], "takes one request, 2 are given"),
    ],
)
def test_reflection_errors_say_what_there_is(server, name: str, records: list[Any], words: str):
    with pytest.raises(ReflectionError, match=words):
        answers(server, name, *records)


def test_reflection_a_server_without_it():
    with serving("none") as server, pytest.raises(ReflectionError, match="has no reflection"):
        server.services()
