"""The methods of a running mesh, each with valid requests to start mutations from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from kvmesh.integration.launch_state import MeshState
from kvmesh.oip import inference_pb2 as oip
from kvmesh.services.common.client import Deadlines, Link
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import (
    common_pb2,
    inference_pb2,
    kvcache_pb2,
    kvcache_pb2_grpc,
    mesh_pb2,
    tokenizer_pb2,
    worker_pb2,
)

PROMPT_TOKENS = 150  # two blocks, and some
# Calls that stream, or that compute for as long as they are asked to.
_LASTING = frozenset(
    {"Generate", "GenerateMany", "ModelInfer", "ModelStreamInfer", "Attach", "Watch", "Detokenize"}
)
_SAMPLING = common_pb2.SamplingParams(
    temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3, max_tokens=4,
    stop=["zz"], stop_token_ids=[7], logprobs=True, top_logprobs=2, logit_bias={5: 1.0},
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """One method of one process. lasts: it may go on for long, and is left after a while."""

    address: str
    method: MethodDescriptor
    seeds: Sequence[Message]

    @property
    def lasts(self) -> bool:
        return self.method.name in _LASTING


async def find_targets(state: MeshState) -> list[Target]:
    """Every method of every kind of process; membership last, as it can make the others fail."""
    model, keys, block = await _learn(state)
    members = {member.kind: member.addresses[0] for member in state.members if member.addresses}
    found = [
        *_targets(state.public_address, inference_pb2, "Inference", _inference_seeds()),
        *_targets(members["tokenizer"], tokenizer_pb2, "Tokenizer", _tokenizer_seeds()),
        *_targets(members["worker"], worker_pb2, "Worker", _worker_seeds(members)),
    ]
    if "kvcache" in members:
        seeds = _kvcache_seeds(keys, block)
        found += _targets(members["kvcache"], kvcache_pb2, "KvCache", seeds)
    if state.oip_address:
        found += _targets(state.oip_address, oip, "GRPCInferenceService", _oip_seeds(model.name))
    found += _targets(state.mesh_address, mesh_pb2, "Mesh", _mesh_seeds(model))
    return found


async def _learn(state: MeshState) -> tuple[inference_pb2.ModelInfo, list[bytes], bytes]:
    """The model, keys of blocks that a shard holds, and the bytes of one."""
    async with Link(state.public_address) as link:
        client = InferenceClient(link)
        model = (await client.list_models()).models[0]
        await warm_up(client, Deadlines().get_s)
    shards = [m.addresses[0] for m in state.members if m.kind == "kvcache"]
    if not shards:
        return model, [b"k" * 16], b""
    async with Link(shards[-1]) as link:
        stub: Any = kvcache_pb2_grpc.KvCacheStub(link.channel)
        watch = stub.Watch(kvcache_pb2.WatchRequest(), timeout=Deadlines().get_s)
        keys = list((await watch.read()).stored)[:4] or [b"k" * 16]
        watch.cancel()
        asked = kvcache_pb2.GetRequest(keys=keys[:1])
        blocks = [reply.data async for reply in stub.Get(asked, timeout=Deadlines().get_s)]
    return model, keys, blocks[0]


async def warm_up(client: InferenceClient, timeout_s: float) -> None:
    """Runs a plain request, text and all. Raises the MeshError that it ended with."""
    request = inference_pb2.GenerateRequest(text="one two " * PROMPT_TOKENS)
    request.sampling.max_tokens = 2
    async for _ in client.generate(request, timeout_s):
        pass


def _targets(
    address: str, module: Any, service: str, seeds: dict[str, Sequence[Message]]
) -> list[Target]:
    """A method without seeds of its own starts from an empty request."""
    described = module.DESCRIPTOR.services_by_name[service]
    return [
        Target(address, method, seeds.get(method.name) or [_empty(method)])
        for method in described.methods
    ]


def _empty(method: MethodDescriptor) -> Message:
    return message_factory.GetMessageClass(method.input_type)()


def _chat() -> inference_pb2.ChatPrompt:
    chat = inference_pb2.ChatPrompt()
    chat.messages.add(role="system", content="brief")
    chat.messages.add(role="user", content="Hello", name="me")
    return chat


def _inference_seeds() -> dict[str, Sequence[Message]]:
    make = inference_pb2.GenerateRequest
    constrained = common_pb2.SamplingParams(max_tokens=4)
    constrained.constraint.regex = "[a-z]{2}"
    generate = [
        make(text="Hello", sampling=_SAMPLING, request_id="r", cache_salt="s"),
        make(chat=_chat(), sampling=_SAMPLING, echo_token_ids=True),
        make(tokens=inference_pb2.TokenPrompt(ids=range(9, 90)), sampling=constrained),
    ]
    make_item = inference_pb2.GenerateItem
    items = [make_item(id=number, request=request) for number, request in enumerate(generate)]
    return {
        "Generate": generate,
        "GenerateMany": [
            inference_pb2.GenerateBatch(items=items),
            inference_pb2.GenerateBatch(items=[items[0], make_item(id=0, cancel=True)]),
        ],
        "Route": [inference_pb2.RouteRequest(request=request) for request in generate],
    }


def _tokenizer_seeds() -> dict[str, Sequence[Message]]:
    item = tokenizer_pb2.DetokenizeItem(request_id="r", token_ids=[70, 71, 200], stop=["zz"])
    last = tokenizer_pb2.DetokenizeItem(request_id="r", token_ids=[72], end=True)
    return {
        "Encode": [
            tokenizer_pb2.EncodeRequest(text="Hello there", cache_salt="s"),
            tokenizer_pb2.EncodeRequest(chat=_chat()),
        ],
        "Decode": [tokenizer_pb2.DecodeRequest(token_ids=range(60, 90))],
        "Detokenize": [
            tokenizer_pb2.DetokenizeRequest(items=[item]),
            tokenizer_pb2.DetokenizeRequest(items=[item, last]),
        ],
    }


def _worker_seeds(members: dict[str, str]) -> dict[str, Sequence[Message]]:
    submit = worker_pb2.Submit(
        request_id="r",
        token_ids=range(20, 20 + PROMPT_TOKENS),
        num_prompt_tokens=PROMPT_TOKENS,
        sampling=_SAMPLING,
        cache_salt="s",
        deadline_ms=5000,
        shard_addresses=[members["kvcache"]] if "kvcache" in members else [],
    )
    submit.trace.traceparent = f"00-{'1' * 32}-{'2' * 16}-01"
    prefill = worker_pb2.Submit()
    prefill.CopyFrom(submit)
    prefill.prefill_only, prefill.tail_address = True, members["worker"]
    cancel = worker_pb2.Cancel(request_id="r")
    return {
        "Attach": [
            worker_pb2.RouterMessage(submit=[submit]),
            worker_pb2.RouterMessage(submit=[prefill], cancel=[cancel]),
        ],
        "FetchTail": [worker_pb2.FetchTailRequest(request_id="r")],
    }


def _kvcache_seeds(keys: Sequence[bytes], block: bytes) -> dict[str, Sequence[Message]]:
    return {
        "Lookup": [kvcache_pb2.LookupRequest(keys=keys, lease_ms=500)],
        "Put": [
            kvcache_pb2.PutRequest(key=b"f" * 16, data=block),
            kvcache_pb2.PutRequest(key=b"g" * 16, parent=b"f" * 16, index=1, data=block),
        ],
        "Get": [kvcache_pb2.GetRequest(keys=keys, lease_id="x")],
        "Release": [kvcache_pb2.ReleaseRequest(lease_id="x")],
        "Corrupt": [kvcache_pb2.CorruptRequest(key=keys[0], offset=3)],
    }


def _mesh_seeds(model: inference_pb2.ModelInfo) -> dict[str, Sequence[Message]]:
    known: dict[str, Any] = {"member_id": "fuzz", "incarnation": 5}
    kinds = (("worker", "both"), ("kvcache", ""), ("tokenizer", ""), ("gateway", ""))
    registers = [
        mesh_pb2.RegisterRequest(
            member=mesh_pb2.Member(
                **known, kind=kind, role=role, address="127.0.0.1:1", model=model
            )
        )
        for kind, role in kinds
    ]
    return {
        "Register": registers,
        "Renew": [mesh_pb2.RenewRequest(**known)],
        "Leave": [mesh_pb2.LeaveRequest(**known)],
        "ListMembers": [mesh_pb2.ListMembersRequest(kind="worker")],
    }


def _oip_seeds(model: str) -> dict[str, Sequence[Message]]:
    sampling = json.dumps({"max_tokens": 4, "temperature": "0.5", "stop": ["zz"], "seed": 1})
    typed = oip.ModelInferRequest(model_name=model, id="x")
    for name, text in (("text_input", "Hello"), ("sampling_parameters", sampling)):
        tensor = typed.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(text.encode())
    raw = oip.ModelInferRequest(model_name=model, id="y")
    raw.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    raw.inputs.add(name="return_logprobs", datatype="BOOL", shape=[1])
    raw.raw_input_contents.extend((b"\x05\x00\x00\x00Hello", b"\x01"))
    raw.parameters["max_tokens"].int64_param = 4
    raw.parameters["timeout"].int64_param = 2_000_000
    raw.outputs.add(name="text_output")
    streamed = oip.ModelInferRequest()
    streamed.CopyFrom(typed)
    tensor = streamed.inputs.add(name="stream", datatype="BOOL", shape=[1])
    tensor.contents.bool_contents.append(True)
    named: dict[str, Any] = {"name": model, "version": "1"}
    return {
        "ModelInfer": [typed, raw],
        "ModelStreamInfer": [streamed, raw],
        "ModelReady": [oip.ModelReadyRequest(**named)],
        "ModelMetadata": [oip.ModelMetadataRequest(**named)],
        "ModelConfig": [oip.ModelConfigRequest(**named)],
    }
