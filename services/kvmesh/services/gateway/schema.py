"""The bodies of OpenAI's requests, checked. What is not a field of theirs is refused by name.

Fields that cannot change the answer here (`user`, `metadata`, `store` ...) are taken and ignored;
fields that would, and that the mesh cannot honour, are refused. docs/http.md has the table.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from kvmesh.services.gateway.errors import ApiError, invalid, unsupported

MAX_CHOICES = 128  # of one request: prompts times n
MAX_MESSAGE_CHARS = 200  # of what is said about a wrong value

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 32)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr


class FunctionCall(Body):
    name: StrictStr
    arguments: StrictStr


class ToolCall(Body):
    id: StrictStr
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | tuple[TextPart, ...] | None = None
    name: StrictStr | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None
    annotations: Any = None  # what an earlier answer carried may be sent back as it was
    audio: None = None
    function_call: None = None


class Tool(Body):
    type: Literal["function"]
    function: dict[str, Any]


class JsonSchema(Body):
    name: StrictStr
    schema_: dict[str, Any] = Field(alias="schema")
    description: StrictStr | None = None
    strict: StrictBool | None = None


class ResponseFormat(Body):
    """{"type": "regex", "pattern": ...} is an extension; the others are OpenAI's."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    pattern: StrictStr | None = None


class StreamOptions(Body):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None  # nothing is obfuscated
    continuous_usage_stats: StrictBool | None = None  # taken; usage comes at the end


class Common(Body):
    """What both kinds of completion have."""

    model: Annotated[StrictStr, Field(min_length=1)]
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    stop: StrictStr | Annotated[tuple[StrictStr, ...], Field(max_length=16)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    logit_bias: dict[Annotated[int, Field(ge=0, lt=1 << 32)], Number] | None = None
    response_format: ResponseFormat | None = None
    # extensions, under the names that vLLM's API has for them
    top_k: Annotated[StrictInt, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    min_tokens: Count | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: tuple[TokenId, ...] | None = None
    include_stop_str_in_output: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    cache_salt: StrictStr | None = None
    # taken and ignored
    user: StrictStr | None = None


class ChatRequest(Common):
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: Any = None
    # taken and ignored
    metadata: Any = None
    store: StrictBool | None = None
    service_tier: StrictStr | None = None
    parallel_tool_calls: StrictBool | None = None
    prediction: Any = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: StrictStr | None = None
    safety_identifier: StrictStr | None = None


Ids = Annotated[tuple[TokenId, ...], Field(min_length=1)]


class CompletionRequest(Common):
    # The first that fits; to look for a better one would check each id several times.
    prompt: Annotated[
        StrictStr | Ids | tuple[StrictStr, ...] | tuple[Ids, ...],
        Field(union_mode="left_to_right"),
    ]
    best_of: StrictInt | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    suffix: StrictStr | None = None


_REFUSED = {
    "audio": "answers are text",
    "functions": "it is deprecated; send 'tools'",
    "function_call": "it is deprecated; send 'tool_choice'",
    "moderation": "nothing is moderated here",
    "reasoning_effort": "the model's template decides",
    "verbosity": "the model's template decides",
    "web_search_options": "the mesh reaches nothing outside itself",
}


def parse_chat(body: bytes) -> ChatRequest:
    """Raises ApiError naming the field that is wrong."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises ApiError naming the field that is wrong."""
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ApiError:
    """The first thing that is wrong. Never the value of a field, which may be a prompt."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, place = first["type"], first["loc"]
    if kind == "json_invalid":
        return invalid(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    top = str(place[0])[:MAX_MESSAGE_CHARS] if place else None
    if top is None:
        return invalid("the body must be a JSON object", code="invalid_type")
    name = ".".join(str(part)[:MAX_MESSAGE_CHARS] for part in place[:6])
    if kind == "missing":
        return invalid(f"Missing required parameter: '{name}'.", top, "missing_required_parameter")
    if kind == "extra_forbidden":
        if len(place) == 1 and top in _REFUSED:
            return unsupported(top, _REFUSED[top])
        return invalid(f"Unknown parameter: '{name}'.", top, "unknown_parameter")
    return invalid(f"Invalid '{name}': {first['msg']}.", top, "invalid_value")
