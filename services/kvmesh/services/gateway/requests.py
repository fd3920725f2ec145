"""OpenAI's requests as kvmesh.v1.GenerateRequest, one for each choice. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvmesh.services.gateway.errors import invalid, unsupported
from kvmesh.services.gateway.schema import (
    MAX_CHOICES,
    ChatRequest,
    Common,
    CompletionRequest,
    Message,
    ResponseFormat,
)
from kvmesh.v1 import common_pb2, inference_pb2

DEFAULT_TEMPERATURE = 1.0  # what OpenAI's API takes if nothing is said
DEFAULT_COMPLETION_TOKENS = 16  # likewise, of /v1/completions
SEEDS = 1 << 64
ANY_JSON_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class Plan:
    """What one HTTP request asks of the mesh.

    generate: one request per choice, in the order of their indices: n of the first prompt, n of
    the second ... echo: for each choice, the text or ids that go before its output.
    """

    generate: tuple[inference_pb2.GenerateRequest, ...]
    model: str
    stream: bool
    include_usage: bool
    logprobs: bool
    num_prompts: int = 1
    echo: tuple[str | tuple[int, ...], ...] = ()


def plan_chat(request: ChatRequest, request_id: str) -> Plan:
    """Raises ApiError for a combination that is wrong or that the mesh cannot honour."""
    _check_chat(request)
    sampling = _sampling(request)
    _limit(sampling, request.max_completion_tokens, request.max_tokens)
    sampling.logprobs = bool(request.logprobs)
    sampling.top_logprobs = request.top_logprobs or 0
    prompt = inference_pb2.GenerateRequest(chat=_chat_prompt(request))
    return _plan(request, request_id, [prompt], sampling)


def plan_completion(request: CompletionRequest, request_id: str) -> Plan:
    """Raises ApiError for a combination that is wrong or that the mesh cannot honour."""
    if request.suffix:
        raise unsupported("suffix", "the mesh's models do not fill in")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "choices are not ranked; leave it out or set it to n")
    if request.echo and request.logprobs is not None:
        raise unsupported("echo", "with logprobs: those of the prompt are not computed")
    sampling = _sampling(request)
    limit = request.max_tokens
    _limit(sampling, DEFAULT_COMPLETION_TOKENS if limit is None else limit, None)
    sampling.logprobs = request.logprobs is not None
    sampling.top_logprobs = request.logprobs or 0
    prompts = _prompts(request)
    return _plan(request, request_id, [_prompt(p) for p in prompts], sampling, prompts)


def _plan(
    request: Common,
    request_id: str,
    prompts: Sequence[inference_pb2.GenerateRequest],
    sampling: common_pb2.SamplingParams,
    echoed: Sequence[str | tuple[int, ...]] = (),
) -> Plan:
    if request.stream_options is not None and not request.stream:
        raise invalid("'stream_options' needs 'stream' to be true", "stream_options")
    n = request.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise invalid(
            f"{len(prompts)} prompts with n = {n} are {len(prompts) * n} choices, "
            f"at most {MAX_CHOICES} are made at once", "n"
        )  # fmt: skip
    made = []
    for index in range(len(prompts) * n):
        one = inference_pb2.GenerateRequest(model=request.model, sampling=sampling)
        one.MergeFrom(prompts[index // n])
        one.cache_salt = request.cache_salt or ""
        one.request_id = request_id if len(prompts) * n == 1 else f"{request_id}-{index}"
        if request.seed is not None:  # with one seed, all choices of a prompt would be the same
            one.sampling.seed = (request.seed + index % n) % SEEDS
        made.append(one)
    echo = isinstance(request, CompletionRequest) and request.echo
    options = request.stream_options
    return Plan(
        generate=tuple(made),
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(options is not None and options.include_usage),
        logprobs=sampling.logprobs,
        num_prompts=len(prompts),
        echo=tuple(echoed[index // n] for index in range(len(made))) if echo else (),
    )


def _sampling(request: Common) -> common_pb2.SamplingParams:
    stop = (request.stop,) if isinstance(request.stop, str) else request.stop or ()
    params = common_pb2.SamplingParams(
        temperature=DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
        top_p=request.top_p,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias or {},
        stop_token_ids=request.stop_token_ids or (),
        stop=stop,
        ignore_eos=bool(request.ignore_eos),
        min_tokens=request.min_tokens or 0,
        include_stop=bool(request.include_stop_str_in_output),
        keep_special_tokens=request.skip_special_tokens is False,
    )
    constraint = _constraint(request.response_format)
    if constraint is not None:
        params.constraint.CopyFrom(constraint)
    return params


def _limit(sampling: common_pb2.SamplingParams, first: int | None, second: int | None) -> None:
    """The first limit that is given; a limit of 0 is refused by the router, by name."""
    limit = first if first is not None else second
    if limit is not None:
        sampling.max_tokens = limit


def _constraint(wanted: ResponseFormat | None) -> common_pb2.OutputConstraint | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return common_pb2.OutputConstraint(json_schema=ANY_JSON_OBJECT)
    if wanted.type == "regex":
        if not wanted.pattern:
            raise invalid("Missing required parameter: 'response_format.pattern'.",
                          "response_format", "missing_required_parameter")  # fmt: skip
        return common_pb2.OutputConstraint(regex=wanted.pattern)
    if wanted.json_schema is None:
        raise invalid("Missing required parameter: 'response_format.json_schema'.",
                      "response_format", "missing_required_parameter")  # fmt: skip
    return common_pb2.OutputConstraint(json_schema=json.dumps(wanted.json_schema.schema_))


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs' to be true", "top_logprobs")
    if request.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", "it must be 'none' or 'auto'; the model decides")
    for number, tool in enumerate(request.tools or ()):
        if not isinstance(tool.function.get("name"), str):
            raise invalid(f"Missing required parameter: 'tools.{number}.function.name'.",
                          "tools", "missing_required_parameter")  # fmt: skip


def _chat_prompt(request: ChatRequest) -> inference_pb2.ChatPrompt:
    tools = request.tools if request.tool_choice != "none" else None
    return inference_pb2.ChatPrompt(
        messages=[_message(message) for message in request.messages],
        tools=[json.dumps(tool.model_dump()) for tool in tools or ()],
    )


def _message(message: Message) -> inference_pb2.ChatMessage:
    content = message.content
    if content is not None and not isinstance(content, str):
        content = "".join(part.text for part in content)
    return inference_pb2.ChatMessage(
        # `developer` is the newer name of what chat templates know as `system`
        role="system" if message.role == "developer" else message.role,
        content=content or "",
        name=message.name or "",
        tool_call_id=message.tool_call_id or "",
        tool_calls=[
            inference_pb2.ToolCall(
                id=call.id, name=call.function.name, arguments=call.function.arguments
            )
            for call in message.tool_calls or ()
        ],
    )


def _prompts(request: CompletionRequest) -> list[str | tuple[int, ...]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("'prompt' is an empty list", "prompt")
    parts: Any = prompt  # of one kind, which the first tells; to ask each would take as long again
    return [parts] if isinstance(prompt[0], int) else list(parts)


def _prompt(prompt: str | tuple[int, ...]) -> inference_pb2.GenerateRequest:
    if isinstance(prompt, str):
        return inference_pb2.GenerateRequest(text=prompt)
    return inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt(ids=prompt))
