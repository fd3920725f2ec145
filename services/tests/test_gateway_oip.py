"""The Open Inference Protocol's edge over real gRPC, in front of a mesh that answers as told."""

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from gateway_fakes import WAIT_S, FakeMesh
from oip_calls import oip_server, parameters, raw_outputs, raw_request, typed_request, with_length

from kvmesh.oip import inference_pb2 as pb
from kvmesh.services.common.callers import Callers
from kvmesh.services.common.errors import InvalidRequest, NotFound, Overloaded, Unavailable

SAID = "Hello é"


async def status_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def streamed(stub: Any, *requests: pb.ModelInferRequest, **call: Any) -> list[Any]:
    async with asyncio.timeout(WAIT_S):
        return [response async for response in stub.ModelStreamInfer(iter(requests), **call)]


async def test_server_and_model_are_described() -> None:
    async with oip_server(FakeMesh()) as (stub, servicer):
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        for name, version, ready in (("mini", "", True), ("mini", "1", True), ("mini", "2", False),
                                     ("other", "", False)):  # fmt: skip
            asked = pb.ModelReadyRequest(name=name, version=version)
            assert (await stub.ModelReady(asked)).ready is ready
        server = await stub.ServerMetadata(pb.ServerMetadataRequest())
        assert server.name == "kvmesh" and server.version and "parameters" in server.extensions
        model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="mini"))
        assert (model.name, list(model.versions)) == ("mini", ["1"])
        inputs = {tensor.name: tensor.datatype for tensor in model.inputs}
        assert (inputs["text_input"], inputs["stream"]) == ("BYTES", "BOOL")
        assert {"text_output", "finish_reason"} <= {tensor.name for tensor in model.outputs}
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name="mini"))).config
        assert config.model_transaction_policy.decoupled and config.max_batch_size == 0
        required = [tensor.name for tensor in config.input if not tensor.optional]
        assert required == ["text_input"]
        assert {tensor.name: tensor.data_type for tensor in config.input}[
            "sampling_parameters"
        ] == pb.TYPE_STRING
        assert config.parameters["max_context"].string_value == "100"
        for ask in (stub.ModelMetadata, stub.ModelConfig):
            code, said = await status_of(ask(pb.ModelMetadataRequest(name="gpt")))
            assert code is grpc.StatusCode.NOT_FOUND and "'gpt'" in said and "mini" in said
        servicer.edge = None
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
        code, _ = await status_of(stub.ModelInfer(raw_request("x")))
        assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_whole_answer_raw_and_typed() -> None:
    mesh = FakeMesh()
    options = {"exclude_input_in_output": True, "sampling_parameters": {
        "temperature": "0.25", "max_tokens": 5, "top_k": 3, "stop": ["x"], "seed": 9,
        "ignore_eos": "true", "min_tokens": "1"}}  # fmt: skip
    async with oip_server(mesh) as (stub, _):
        raw = await stub.ModelInfer(raw_request("Say", **options))
        assert (raw.model_name, raw.model_version, raw.id) == ("mini", "1", "call-1")
        assert raw_outputs(raw) == {"text_output": [SAID], "finish_reason": ["stop"]}
        typed = await stub.ModelInfer(typed_request("Say", **options))
        assert not typed.raw_output_contents
        assert list(typed.outputs[0].contents.bytes_contents) == [SAID.encode()]
    first, second = mesh.requests
    assert first.text == "Say" and first.model == "mini"
    sampling = first.sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.top_k) == (0.25, 5, 3)
    assert (list(sampling.stop), sampling.seed, sampling.min_tokens) == (["x"], 9, 1)
    assert sampling.ignore_eos
    assert first.request_id != second.request_id
    assert second.sampling == first.sampling


async def test_the_prompt_comes_back_unless_the_caller_says_no() -> None:
    """Triton's vLLM backend does so; and without parameters, vLLM's defaults hold."""
    mesh = FakeMesh()
    async with oip_server(mesh) as (stub, _):
        answer = await stub.ModelInfer(raw_request("Say "))
        assert raw_outputs(answer)["text_output"] == ["Say " + SAID]
    assert (mesh.requests[0].sampling.temperature, mesh.requests[0].sampling.max_tokens) == (1, 16)


async def test_outputs_are_what_was_asked_for() -> None:
    async with oip_server(FakeMesh()) as (stub, _):
        switches = {f"return_{name}": True for name in (
            "finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens",
            "num_output_tokens")}  # fmt: skip
        found = raw_outputs(await stub.ModelInfer(raw_request(
            "Say", exclude_input_in_output=True, sampling_parameters={"logprobs": 2}, **switches
        )))  # fmt: skip
        assert found["text_output"] == [SAID]
        assert (found["num_input_tokens"], found["num_output_tokens"]) == ([7], [3])
        assert found["cumulative_logprob"] == [-1.0]
        positions = json.loads(found["logprobs"][0])
        assert positions[0]["72"] == {"logprob": -0.5, "rank": 1, "decoded_token": "H"}
        assert positions[0]["195"]["logprob"] == -9999.0
        named = raw_request("Say")
        named.outputs.add(name="num_output_tokens")
        assert raw_outputs(await stub.ModelInfer(named)) == {"num_output_tokens": [3]}
        several = raw_request("Say", sampling_parameters={"n": 3, "seed": 4})
        found = raw_outputs(await stub.ModelInfer(several))
        assert found["text_output"] == ["Say" + SAID] * 3


async def test_request_parameters_and_tensors_both_carry_sampling() -> None:
    mesh = FakeMesh()
    request = raw_request("Say", sampling_parameters={"max_tokens": 4})
    request.parameters["temperature"].double_param = 0.5
    request.parameters["max_tokens"].int64_param = 9
    request.parameters["stop"].string_param = "7"
    request.parameters["priority"].uint64_param = 0
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    request.parameters["timeout"].int64_param = 5_000_000
    async with oip_server(mesh) as (stub, _):
        await stub.ModelInfer(request)
    sampling = mesh.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, list(sampling.stop)) == (0.5, 4, ["7"])


async def test_a_stream_of_several_requests() -> None:
    async with oip_server(FakeMesh()) as (stub, _):
        one = raw_request("a", stream=True)
        two = raw_request("b", exclude_input_in_output=True)
        two.id = "call-2"
        three = raw_request("c", streaming=True, sampling_parameters={"n": 2},
                            return_num_output_tokens=True)  # fmt: skip
        three.id = "call-3"
        found = await streamed(stub, one, two, three)
        assert {response.error_message for response in found} == {""}
        pieces: dict[str, list[Any]] = {}
        for response in found:
            pieces.setdefault(response.infer_response.id, []).append(response.infer_response)
        assert set(pieces) == {"call-1", "call-2", "call-3"}
        assert [raw_outputs(p)["text_output"] for p in pieces["call-1"]] == [
            ["Hel"],
            ["lo é"],
            [""],
        ]
        assert [raw_outputs(p)["finish_reason"] for p in pieces["call-1"]] == [[""], [""], ["stop"]]
        finals = [parameters(p)["triton_final_response"] for p in pieces["call-1"]]
        assert finals == [False, False, True]
        assert [raw_outputs(p)["text_output"] for p in pieces["call-2"]] == [[SAID]]
        texts = [raw_outputs(p)["text_output"] for p in pieces["call-3"]]
        assert ["".join(text) for text in zip(*texts, strict=True)] == [SAID, SAID]
        counts = [raw_outputs(p)["num_output_tokens"] for p in pieces["call-3"]]
        assert [sum(column) for column in zip(*counts, strict=True)] == [3, 3]
        finals = [parameters(p)["triton_final_response"] for p in pieces["call-3"]]
        assert finals == [False] * 5 + [True]


async def test_a_failed_request_of_a_stream_leaves_the_others() -> None:
    bad = raw_request("a", stream=True, sampling_parameters={"temperature": -1})
    good = raw_request("b", exclude_input_in_output=True)
    good.id = "call-2"
    async with oip_server(FakeMesh()) as (stub, _):
        found = {r.infer_response.id: r for r in await streamed(stub, bad, good)}
        assert "temperature" in found["call-1"].error_message
        assert parameters(found["call-1"].infer_response)["grpc_status"] == "INVALID_ARGUMENT"
        assert raw_outputs(found["call-2"].infer_response)["text_output"] == [SAID]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await streamed(stub, bad, good, metadata=(("triton_grpc_error", "true"),))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def _twice(request: pb.ModelInferRequest) -> None:
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])


def _unknown(request: pb.ModelInferRequest) -> None:
    request.inputs.add(name="text_inputs", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(with_length(b""))


def _raw(data: bytes) -> Any:
    return lambda request: request.raw_input_contents.__setitem__(0, data)


def _set(name: str, **value: Any) -> Any:
    return lambda request: request.parameters[name].MergeFrom(pb.InferParameter(**value))


def _shared(request: pb.ModelInferRequest) -> None:
    request.inputs[0].parameters["shared_memory_region"].string_param = "x"


WRONG: list[tuple[str, Any, str]] = [
    ("model_name is empty", lambda r: r.ClearField("model_name"), "INVALID_ARGUMENT"),
    ("no input 'text_inputs'; did you mean 'text_input'", _unknown, "INVALID_ARGUMENT"),
    ("has 2 entries", lambda r: r.raw_input_contents.append(b""), "INVALID_ARGUMENT"),
    ("datatype 'INT32'", lambda r: setattr(r.inputs[0], "datatype", "INT32"), "INVALID_ARGUMENT"),
    ("shape [2]", lambda r: r.inputs[0].shape.__setitem__(0, 2), "INVALID_ARGUMENT"),
    ("begin with a length", _raw(b"ab"), "INVALID_ARGUMENT"),
    ("a length of 4 bytes, 5 follow", _raw(with_length(b"abcd") + b"e"), "INVALID_ARGUMENT"),
    ("not UTF-8 at byte 1", _raw(with_length(b"a\xff")), "INVALID_ARGUMENT"),
    ("missing or empty", _raw(with_length(b"")), "INVALID_ARGUMENT"),
    ("there twice", _twice, "INVALID_ARGUMENT"),
    ("has contents, and raw", lambda r: r.inputs[0].contents.bytes_contents.append(b"x"),
     "INVALID_ARGUMENT"),
    ("shared_memory_region", _shared, "INVALID_ARGUMENT"),
    ("no output 'text_out'; did you mean 'text_output'", lambda r: r.outputs.add(name="text_out"),
     "INVALID_ARGUMENT"),
    ("did you mean 'temperature'", _set("temperatur", double_param=1), "INVALID_ARGUMENT"),
    ("neither state nor priority", _set("sequence_id", int64_param=3), "INVALID_ARGUMENT"),
    ("microseconds", _set("timeout", int64_param=-3), "INVALID_ARGUMENT"),
    ("has no value", _set("top_p"), "INVALID_ARGUMENT"),
    ("has version 1, not '7'", lambda r: setattr(r, "model_version", "7"), "NOT_FOUND"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "spoil", "code"), WRONG, ids=[case[0] for case in WRONG])
async def test_what_is_wrong_is_named(said: str, spoil: Any, code: str) -> None:
    mesh = FakeMesh()
    request = raw_request("Say")
    spoil(request)
    async with oip_server(mesh) as (stub, _):
        found, message = await status_of(stub.ModelInfer(request))
    assert found.name == code
    assert said in message
    assert not mesh.requests


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"stream": True}, "call ModelStreamInfer"),
        ({"stream": True, "streaming": False}, "different things"),
        ({"sampling_parameters": "[1]"}, "not a JSON object"),
        ({"sampling_parameters": "[" * 100_000}, "not a JSON object"),
        ({"sampling_parameters": {"guided": 1}}, "no sampling parameter 'guided'"),
        ({"sampling_parameters": {"top_p": 7}}, "top_p"),
        ({"sampling_parameters": {"stream": True}}, "no sampling parameter 'stream'"),
    ],
)
async def test_tensors_that_say_what_cannot_be(tensors: dict[str, Any], said: str) -> None:
    async with oip_server(FakeMesh()) as (stub, _):
        code, message = await status_of(stub.ModelInfer(raw_request("Say", **tensors)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("router:1: no model 'x'"), grpc.StatusCode.NOT_FOUND),
        (Overloaded("router:1: full", 0.25), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("router:1: no worker"), grpc.StatusCode.UNAVAILABLE),
        (InvalidRequest("router:1: too long"), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_the_meshs_errors_keep_their_status(error: Any, code: grpc.StatusCode) -> None:
    async with oip_server(FakeMesh(error=error)) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(raw_request("Say"))
    assert caught.value.code() is code
    assert "router:1" not in (caught.value.details() or "")
    trailers = dict(tuple(pair) for pair in caught.value.trailing_metadata() or ())
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert trailers["retry-after-ms"] == "250"


async def test_a_deadline_and_a_client_that_goes_away_end_the_work() -> None:
    mesh = FakeMesh(hold=True)
    late = raw_request("Say")
    late.parameters["timeout"].int64_param = 20_000
    async with oip_server(mesh) as (stub, servicer):
        code, said = await status_of(stub.ModelInfer(late))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED and "0.02 s" in said
        (failed,) = [r for r in await streamed(stub, late) if r.error_message]
        assert parameters(failed.infer_response)["grpc_status"] == "DEADLINE_EXCEEDED"
        code, _ = await status_of(stub.ModelInfer(raw_request("Say"), timeout=0.05))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        call = stub.ModelStreamInfer()
        for _ in range(3):
            await call.write(raw_request("Say", stream=True))
        assert (await call.read()).infer_response.model_name == "mini"
        call.cancel()
        async with asyncio.timeout(WAIT_S):
            while mesh.open or servicer.active:
                await asyncio.sleep(0)


async def test_the_meshs_token_is_asked_for() -> None:
    """And goes on with the request: the edge has no rights of its own to lend."""
    mesh = FakeMesh()
    async with oip_server(mesh, Callers("t0ken")) as (stub, _):
        code, _ = await status_of(stub.ModelInfer(raw_request("Say")))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        await stub.ModelInfer(raw_request("Say"), metadata=(("authorization", "Bearer t0ken"),))
    assert mesh.behalves == ["Bearer t0ken"]
