"""OpenAI's endpoints on a scripted mesh: each field, each refusal, each error, both answers."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import WAIT_S, Caller, FakeMesh, Reply, edge_of
from span_sink import SpanSink

from kvmesh.services.common.api_keys import add_key
from kvmesh.services.common.callers import Callers
from kvmesh.services.common.errors import (
    ContextExceeded,
    Corrupt,
    Expired,
    InvalidRequest,
    MeshError,
    NotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from kvmesh.services.common.key_file import KeyFile, changing
from kvmesh.services.common.telemetry import Telemetry
from kvmesh.v1 import inference_pb2

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "SECRET"}]


async def chat(mesh: FakeMesh, **fields: Any) -> Reply:
    body = {"model": "mini", "messages": USER, **fields}
    return await Caller(edge_of(mesh)).post(CHAT, body)


async def text(mesh: FakeMesh, **fields: Any) -> Reply:
    return await Caller(edge_of(mesh)).post(TEXT, {"model": "mini", "prompt": "Hi", **fields})


async def sent(call: Any = chat, **fields: Any) -> inference_pb2.GenerateRequest:
    """The one request that the mesh got."""
    mesh = FakeMesh()
    reply = await call(mesh, **fields)
    assert reply.status == 200, reply.body
    (request,) = mesh.requests
    return request


async def test_a_whole_chat_answer() -> None:
    reply = await chat(FakeMesh())
    body = reply.json
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-") and body["system_fingerprint"] == "fp_test"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello é", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert reply.headers["x-request-id"].startswith("req_")
    assert len(reply.headers["x-trace-id"]) == 32


async def test_a_chat_stream_with_usage() -> None:
    reply = await chat(FakeMesh(), stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = reply.events
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 10
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello é"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_a_stream_without_usage_has_none() -> None:
    reply = await chat(FakeMesh(), stream=True)
    assert all("usage" not in chunk for chunk in reply.events[:-1])
    assert reply.events[-1] == "[DONE]"


async def test_completions_whole_and_streamed_say_the_same() -> None:
    whole = (await text(FakeMesh(), echo=True)).json["choices"][0]
    streamed = (await text(FakeMesh(), echo=True, stream=True)).events[:-1]
    assert whole["text"] == "HiHello é" and whole["finish_reason"] == "stop"
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == whole["text"]


async def test_several_prompts_and_choices() -> None:
    mesh = FakeMesh()
    reply = await text(mesh, prompt=["ab", "cd"], n=2, seed=5, echo=True)
    choices = reply.json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"][:2] for choice in choices] == ["ab", "ab", "cd", "cd"]
    assert sorted((r.text, r.sampling.seed) for r in mesh.requests) == [
        ("ab", 5), ("ab", 6), ("cd", 5), ("cd", 6),
    ]  # fmt: skip
    assert len({r.request_id for r in mesh.requests}) == 4
    assert reply.json["usage"]["prompt_tokens"] == 14  # each prompt once
    assert reply.json["usage"]["completion_tokens"] == 12


async def test_choices_stream_side_by_side() -> None:
    events = (await chat(FakeMesh(), n=3, stream=True)).events
    texts = {0: "", 1: "", 2: ""}
    for chunk in events[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert set(texts.values()) == {"Hello é"}


async def test_chat_logprobs() -> None:
    reply = await chat(FakeMesh(), logprobs=True, top_logprobs=2)
    first = reply.json["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("H", -0.5, [72])
    assert [top["token"] for top in first["top_logprobs"]] == ["H", "\ufffd"]
    assert first["top_logprobs"][1]["logprob"] == -9999.0  # JSON has no infinity
    streamed = (await chat(FakeMesh(), logprobs=True, stream=True)).events
    tokens = [
        item["token"]
        for chunk in streamed[:-1]
        for item in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert tokens == ["H", "l"]


async def test_completion_logprobs() -> None:
    found = (await text(FakeMesh(), logprobs=2)).json["choices"][0]["logprobs"]
    assert found["tokens"] == ["H", "l"]
    assert found["token_logprobs"] == [-0.5, -0.5]
    assert found["top_logprobs"][0] == {"H": -0.5, "bytes:\\xc3": -9999.0}
    assert found["text_offset"] == [0, 1]
    assert (await text(FakeMesh(), logprobs=0)).json["choices"][0]["logprobs"]["top_logprobs"] == [
        {"H": -0.5},
        {"l": -0.5},
    ]


async def test_fields_reach_the_mesh() -> None:
    request = await sent(
        temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5, stop=["x", "y"], seed=-1, logit_bias={"5": 2, "6": -100},
        max_completion_tokens=9, max_tokens=8, min_tokens=2, ignore_eos=True, stop_token_ids=[3],
        include_stop_str_in_output=True, skip_special_tokens=False, cache_salt="s",
    )  # fmt: skip
    params = request.sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 3, 0.125)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.repetition_penalty == 1.5
    assert list(params.stop) == ["x", "y"] and list(params.stop_token_ids) == [3]
    assert params.seed == 2**64 - 1
    assert dict(params.logit_bias) == {5: 2.0, 6: -100.0}
    assert (params.max_tokens, params.min_tokens) == (9, 2)
    assert params.ignore_eos and params.include_stop and params.keep_special_tokens
    assert request.cache_salt == "s" and request.model == "mini"


async def test_defaults_are_those_of_the_api() -> None:
    request = await sent()
    assert request.sampling.temperature == 1.0
    assert not request.sampling.HasField("max_tokens")
    assert not request.sampling.HasField("seed") and not request.sampling.HasField("top_p")
    assert (await sent(text)).sampling.max_tokens == 16
    assert (await sent(text, prompt=[1, 2, 3])).tokens.ids == [1, 2, 3]
    assert (await sent(stop="one")).sampling.stop == ["one"]


async def test_what_cannot_change_the_answer_is_ignored() -> None:
    await sent(
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True,
        prompt_cache_key="k", safety_identifier="i", prediction=None,
    )  # fmt: skip


async def test_messages_and_tools() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    request = await sent(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"},
                                                        {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "found"},
        ],
        tools=[tool],
        tool_choice="auto",
    )  # fmt: skip
    system, user, assistant, answer = request.chat.messages
    assert (system.role, system.content) == ("system", "be brief")
    assert (user.name, user.content) == ("Ann", "ab")
    assert (assistant.content, assistant.tool_calls[0].name) == ("", "look")
    assert (answer.tool_call_id, answer.content) == ("c1", "found")
    assert '"look"' in request.chat.tools[0]
    assert not (await sent(tools=[tool], tool_choice="none")).chat.tools


@pytest.mark.parametrize(
    ("form", "kind", "value"),
    [
        ({"type": "json_object"}, "json_schema", '{"type":"object"}'),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}},
            "json_schema",
            '{"type": "integer"}',
        ),
        ({"type": "regex", "pattern": "a+"}, "regex", "a+"),
        ({"type": "text"}, None, ""),
    ],
)
async def test_response_formats(form: dict[str, Any], kind: str | None, value: str) -> None:
    constraint = (await sent(response_format=form)).sampling.constraint
    assert constraint.WhichOneof("kind") == kind
    assert kind is None or getattr(constraint, kind) == value


REFUSED: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({"model": None}, "model", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
        "invalid_value",
    ),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", "missing_required_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
    ({"functions": []}, "functions", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    ({"response_format": {"type": "regex"}}, "response_format", "missing_required_parameter"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "missing_required_parameter"),
    ({"tempreature": 1}, "tempreature", "unknown_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED)
async def test_wrong_fields_are_named(
    fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    mesh = FakeMesh()
    reply = await chat(mesh, **fields)
    assert reply.status == 400
    assert (reply.error["type"], reply.error["param"], reply.error["code"]) == (
        "invalid_request_error", param, code,
    )  # fmt: skip
    assert "SECRET" not in reply.error["message"]
    assert not mesh.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
    ],
)
async def test_wrong_fields_of_completions(fields: dict[str, Any], param: str) -> None:
    reply = await text(FakeMesh(), **fields)
    assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"model": NaN}', b"\xff", b"[" * 9999]
)
async def test_bodies_that_are_no_request(body: bytes) -> None:
    reply = await Caller(edge_of(FakeMesh())).post(CHAT, body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"


ERRORS: list[tuple[MeshError, int, str, str | None]] = [
    (InvalidRequest("router:1: temperature is -1"), 400, "invalid_request_error", None),
    (ContextExceeded("too long"), 400, "invalid_request_error", "context_length_exceeded"),
    (Unauthenticated("who"), 401, "invalid_request_error", "invalid_api_key"),
    (NotFound("no model 'x'"), 404, "invalid_request_error", "model_not_found"),
    (Overloaded("full", 1.25), 429, "rate_limit_error", "rate_limit_exceeded"),
    (Unavailable("gone"), 503, "service_unavailable", "service_unavailable"),
    (Expired("late"), 504, "server_error", "timeout"),
    (Corrupt("bits"), 500, "server_error", "internal_error"),
    (MeshError("a secret bug"), 500, "server_error", "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "code"), ERRORS)
async def test_errors_of_the_mesh(
    error: MeshError, status: int, kind: str, code: str | None, stream: bool
) -> None:
    reply = await chat(FakeMesh(error=error), stream=stream)
    assert (reply.status, reply.error["type"], reply.error["code"]) == (status, kind, code)
    assert "router:1" not in reply.error["message"] and "secret" not in reply.error["message"]
    if status == 429:
        assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("2", "1250")
    if isinstance(error, InvalidRequest) and not code:
        assert reply.error["param"] == "temperature"


async def test_an_error_after_the_first_token_ends_the_stream_with_it() -> None:
    reply = await chat(FakeMesh(error=Unavailable("gone"), error_after=1), stream=True)
    assert reply.status == 200
    assert reply.events[-1]["error"]["code"] == "service_unavailable"
    assert "[DONE]" not in reply.events


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_ends_its_generations(stream: bool, n: int) -> None:
    mesh = FakeMesh(hold=True)
    caller = Caller(edge_of(mesh), gone_after=1)
    body = {"model": "mini", "messages": USER, "stream": stream, "n": n}
    if stream:
        await caller.post(CHAT, body)
    else:
        task = asyncio.create_task(caller.post(CHAT, body))
        async with asyncio.timeout(WAIT_S):
            while len(mesh.requests) < n:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(WAIT_S):
        await mesh.closed.wait()
    assert mesh.open == 0


async def test_models() -> None:
    caller = Caller(edge_of(FakeMesh()))
    listed = (await caller.get("/v1/models")).json
    assert listed["object"] == "list" and listed["data"][0]["id"] == "mini"
    assert (await caller.get("/v1/models/mini")).json["object"] == "model"
    missing = await caller.get("/v1/models/other")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


async def test_urls_and_methods_that_do_not_exist() -> None:
    caller = Caller(edge_of(FakeMesh()))
    assert (await caller.get("/v1/embeddings")).error["code"] == "unknown_url"
    wrong = await caller.get(CHAT)
    assert (wrong.status, wrong.error["code"]) == (405, "method_not_supported")
    plain = await caller.send("POST", CHAT, [b"{}"], **{"content-type": "text/plain"})
    assert (plain.status, plain.error["code"]) == (415, "unsupported_content_type")


async def test_a_token_is_the_api_key() -> None:
    mesh = FakeMesh()
    caller = Caller(edge_of(mesh, Callers("s3cret")))
    assert (await caller.get("/v1/models")).error["code"] == "invalid_api_key"
    wrong = await caller.get("/v1/models", authorization="Bearer other")
    assert (wrong.status, wrong.headers["connection"]) == (401, "close")
    assert (await caller.get("/v1/models", authorization="Bearer s3cret")).status == 200
    assert (await caller.get("/health")).status == 200
    assert mesh.behalves == ["Bearer s3cret"]


async def test_keys_of_tenants(tmp_path: Path) -> None:
    with changing(tmp_path / "keys") as held:
        held[0], key = add_key(held[0], "acme", {}, 0)
        held[0], off = add_key(held[0], "beta", {}, 0)
        disabled = held[0].tenants["beta"].model_copy(update={"disabled": True})
        tenants = {**held[0].tenants, "beta": disabled}
        held[0] = held[0].model_copy(update={"tenants": tenants})
    mesh, sink = FakeMesh(), SpanSink()
    edge = edge_of(mesh, Callers("s3cret", KeyFile(tmp_path / "keys")))
    edge.telemetry = Telemetry("gateway", "gateway", sink.senders)
    caller = Caller(edge)
    body = {"model": "mini", "messages": USER}
    reply = await caller.post(CHAT, body, authorization=f"Bearer {key}")
    assert reply.status == 200
    assert mesh.behalves == [f"Bearer {key}"]  # the router is asked as the caller
    refused = await caller.post(CHAT, body, authorization=f"Bearer {off}")
    assert (refused.status, refused.error["code"]) == (403, "permission_denied")
    unknown = await caller.post(CHAT, body, authorization=f"Bearer {key[:-1]}")
    assert (unknown.status, unknown.error["type"]) == (401, "invalid_request_error")
    assert len(mesh.requests) == 1
    edge.telemetry.close()
    named = [record["attributes"].get("kvmesh.tenant") for record in sink.records]
    assert len(named) == 3 and sorted(map(str, named)) == ["None", "None", "acme"]
    assert not any(secret in str(sink.records) for secret in (key, off, "SECRET"))


async def test_an_edge_that_asks_for_nothing_passes_nothing_on() -> None:
    mesh = FakeMesh()
    reply = await Caller(edge_of(mesh)).get("/v1/models", authorization="Bearer any")
    assert reply.status == 200 and mesh.behalves == []


async def test_draining_takes_no_new_requests() -> None:
    edge = edge_of(FakeMesh())
    edge.draining = True
    assert (await Caller(edge).get("/health")).status == 503
    reply = await Caller(edge).post(CHAT, {"model": "mini", "messages": USER})
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")


async def test_limits_of_a_body() -> None:
    caller = Caller(edge_of(FakeMesh(), max_body_bytes=1024))
    told = await caller.send("POST", CHAT, [b"x"], **{"content-length": "2000"})
    assert (told.status, told.error["code"]) == (413, "request_too_large")
    untold = await caller.send("POST", CHAT, [b"x" * 600, b"x" * 600])
    assert (untold.status, untold.headers["connection"]) == (413, "close")


async def test_the_trace_goes_on(tmp_path: Any) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    header = f"00-{trace_id}-00f067aa0ba902b7-01"
    reply = await Caller(edge_of(FakeMesh())).get("/v1/models", traceparent=header)
    assert reply.headers["x-trace-id"] == trace_id
