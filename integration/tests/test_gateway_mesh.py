"""The HTTP edge of a whole mesh, through the `openai` package as it is."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from meshes import Progress, inference, mesh_config, prompts, ready
from openai.types.chat import ChatCompletionMessageParam

from kvmesh.integration.launch import Mesh, running_mesh
from kvmesh.integration.launch_state import log_path, traces_path
from kvmesh.integration.loadgen import RequestResult, run_request
from kvmesh.services.common.config import GatewayConfig, RouterConfig, WorkerConfig
from kvmesh.services.router.client import InferenceClient
from kvmesh.services.traces.query import Filter
from kvmesh.services.traces.reader import SpanReader
from kvmesh.v1 import common_pb2, inference_pb2

ASK: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "The code of Mirado is 5. What is the code of Mirado?"}
]
DECODERS = ("worker-1", "worker-2")  # member names; the first worker prefills
# Long enough that a worker can be killed in the middle of it.
LONG = {
    "type": "object",
    "properties": {
        "names": {
            "type": "array", "minItems": 12, "maxItems": 12,
            "items": {"type": "string", "minLength": 8, "maxLength": 12},
        }
    },
    "required": ["names"],
    "additionalProperties": False,
}  # fmt: skip


@asynccontextmanager
async def edge(
    run_dir: Path, workers: list[WorkerConfig] | None = None, **parts: Any
) -> AsyncIterator[tuple[Mesh, openai.AsyncOpenAI]]:
    config = mesh_config(
        workers or [WorkerConfig(role="both")], gateway=GatewayConfig(port=0), **parts
    )
    async with running_mesh(config, run_dir) as mesh:
        await ready(mesh)
        async with openai.AsyncOpenAI(
            base_url=f"{mesh.http_url}/v1", api_key="any", max_retries=0
        ) as client:
            yield mesh, client


async def test_the_openai_package_unchanged(tmp_path: Path) -> None:
    async with edge(tmp_path) as (mesh, client):
        assert [model.id async for model in client.models.list()] == ["mini"]
        chat = await client.chat.completions.create(
            model="mini", messages=ASK, temperature=0, max_completion_tokens=12,
            logprobs=True, top_logprobs=2,
        )  # fmt: skip
        said = chat.choices[0].message.content
        assert chat.usage is not None and chat.usage.completion_tokens > 0
        logprobs = chat.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert len(logprobs.content) == chat.usage.completion_tokens
        assert said is not None
        assert "".join(item.token for item in logprobs.content).startswith(said)

        stream = await client.chat.completions.create(
            model="mini", messages=ASK, temperature=0, max_completion_tokens=12, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == said
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens

        seeded = [
            await client.completions.create(model="mini", prompt="The", seed=4, n=2, max_tokens=9)
            for _ in range(2)
        ]
        texts = [[choice.text for choice in answer.choices] for answer in seeded]
        assert texts[0] == texts[1] and texts[0][0] != texts[0][1]

        await asyncio.to_thread(use_sync, mesh.http_url, said)
        await errors(client)
        await constrained(client)
        await no_less_than_grpc(mesh, client)
    log = log_path(tmp_path, "gateway").read_text()
    assert "Mirado" not in log and "Traceback" not in log
    with SpanReader(traces_path(tmp_path)) as reader:
        listed = reader.newest(Filter(), 100)
        spans = [span for trace in listed for span in reader.spans(trace.trace_id)]
    roots = [s for s in spans if s.name == "POST /v1/chat/completions"]
    assert roots and "Mirado" not in json.dumps([s.attributes for s in roots])
    below = {s.name for s in spans if s.trace_id == roots[0].trace_id}
    assert {"chat mini", "worker run", "prefill"} <= below


def use_sync(url: str, said: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="mini", messages=ASK, temperature=0, max_tokens=12, stream=True
        )
        assert "".join(c.choices[0].delta.content or "" for c in stream) == said
        ids = client.completions.create(model="mini", prompt=[70, 71, 72], max_tokens=3, echo=True)
        assert ids.choices[0].text.startswith("abc")


async def errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-none", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model="mini", prompt=[5] * 9000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(
            model="mini", messages=ASK, response_format={"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"type": "nonsense"}}},
        )  # fmt: skip
    assert bad.value.param == "response_format" and "nonsense" in bad.value.message
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        tool: Any = {"type": "function", "function": {"name": "look", "parameters": {}}}
        await client.chat.completions.create(model="mini", messages=ASK, tools=[tool])


async def constrained(client: openai.AsyncOpenAI) -> None:
    """Whatever the model would rather say, and at any temperature."""
    pattern: Any = {"type": "regex", "pattern": "[a-f]{4}-[0-9]{3}"}
    for temperature in (0.0, 2.0):
        answer = await client.completions.create(
            model="mini", prompt="The", max_tokens=40, temperature=temperature, seed=1,
            extra_body={"response_format": pattern},
        )  # fmt: skip
        assert re.fullmatch(pattern["pattern"], answer.choices[0].text)
        assert answer.choices[0].finish_reason == "stop"
    schema = {
        "type": "object",
        "properties": {"code": {"type": "integer", "minimum": 0, "maximum": 99},
                       "sure": {"type": "boolean"}},
        "required": ["code", "sure"],
        "additionalProperties": False,
    }  # fmt: skip
    chat = await client.chat.completions.create(
        model="mini", messages=ASK, temperature=1.5, seed=2, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )  # fmt: skip
    found = json.loads(chat.choices[0].message.content or "")
    assert set(found) == {"code", "sure"} and 0 <= found["code"] <= 99
    assert isinstance(found["sure"], bool)


async def no_less_than_grpc(mesh: Mesh, client: openai.AsyncOpenAI) -> None:
    """The same seed says the same over both."""
    request = inference_pb2.GenerateRequest(text="The old", request_id="r")
    request.sampling.MergeFrom(
        common_pb2.SamplingParams(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)
    )
    async with inference(mesh) as direct:
        over_grpc = await run_request(direct, request)
    over_http = await client.completions.create(
        model="mini", prompt="The old", seed=11, max_tokens=20, extra_body={"ignore_eos": True}
    )
    assert over_http.choices[0].text == over_grpc.text


async def test_an_abandoned_stream_frees_its_blocks(tmp_path: Path) -> None:
    async with edge(tmp_path) as (mesh, client), inference(mesh) as direct:

        async def held() -> tuple[int, int]:
            status = await direct.status()
            used = sum(m.blocks_total - m.blocks_free for m in status.members)
            return used, status.requests_active

        stream = await client.completions.create(
            model="mini", prompt=prompts()[0], max_tokens=7000, stream=True, n=3,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        seen = 0
        async for _ in stream:
            seen += 1
            if seen > 60 and (await held())[0]:
                break
        await stream.close()
        # It takes less than a second, and an idle worker reports once a second; but a test is no
        # stop-watch, and a busy machine may be slow.
        async with asyncio.timeout(20.0):
            while await held() != (0, 0):
                await asyncio.sleep(0.05)


async def test_a_full_mesh_answers_429(tmp_path: Path) -> None:
    router = RouterConfig(port=0, max_active=1)
    async with edge(tmp_path, router=router) as (_, client):
        stream = await client.completions.create(
            model="mini",
            prompt="The",
            max_tokens=5000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model="mini", prompt="The")
        assert full.value.code == "rate_limit_exceeded"
        assert int(full.value.response.headers["retry-after"]) >= 1
        await stream.close()


async def kill_while_it_decodes(
    mesh: Mesh, client: InferenceClient, request: inference_pb2.GenerateRequest
) -> RequestResult:
    """Runs a request; SIGKILL of the decode worker that runs it when 20 tokens were heard.

    Both are held before the look at which it is: it cannot end the request between look and kill.
    None is killed if this process heard of the tokens only after the last one.
    """
    progress = Progress()
    running = asyncio.create_task(progress.run_all(client, [request]))
    await progress.wait_for(lambda p: p.num_tokens >= 20)
    restarts = {name: mesh.members[name].restarts for name in DECODERS}
    for name in DECODERS:
        mesh.kill(name, signal.SIGSTOP)
    busy = {member.member_id for member in (await client.status()).members if member.running}
    for name in DECODERS:
        mesh.kill(name, signal.SIGKILL if name in busy else signal.SIGCONT)
    (result,) = await running
    for name in busy.intersection(DECODERS):
        await mesh.wait_restarted(name, restarts[name] + 1)
    await mesh.wait_ready()
    return result


async def test_a_constraint_survives_hand_over_and_migration(tmp_path: Path) -> None:
    workers = [WorkerConfig(role="prefill"), WorkerConfig(role="decode", count=2)]
    schema = json.dumps(LONG)
    request = inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenPrompt(ids=max(prompts(), key=len)), echo_token_ids=True
    )
    request.sampling.MergeFrom(
        common_pb2.SamplingParams(
            temperature=1.3, seed=5, max_tokens=600,
            constraint=common_pb2.OutputConstraint(json_schema=schema),
        )
    )  # fmt: skip
    # Whatever a busy machine's first steps make of the estimates, it is handed over.
    config = mesh_config(workers, router=RouterConfig(port=0, handover_patience=1000.0))
    async with running_mesh(config, tmp_path) as mesh, inference(await ready(mesh)) as client:
        calm = await run_request(client, request)
        assert calm.error == "" and calm.usage.prefill_worker
        for _ in range(10):
            moved = await kill_while_it_decodes(mesh, client, request)
            assert moved.error == ""
            assert moved.token_ids == calm.token_ids
            if moved.usage.migrations:
                break
        else:
            pytest.fail("all tokens had been said before the kill in each of 10 attempts")
    found = json.loads(calm.text)
    assert len(found["names"]) == 12 and all(8 <= len(name) <= 12 for name in found["names"])
