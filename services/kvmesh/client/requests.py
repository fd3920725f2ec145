"""Requests from plain values: a conversation, a text as it is, or token ids."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from kvmesh.v1 import common_pb2
from kvmesh.v1 import inference_pb2 as pb

# {"role": "user", "content": "Hello"}, with the roles that the model's template knows
Message = Mapping[str, str]


class Options(TypedDict, total=False):
    """What a request may set besides its prompt; what is not set is left to the mesh.

    The names, ranges and defaults are those of kvmesh.v1.GenerateRequest and SamplingParams.
    """

    model: str
    request_id: str
    cache_salt: str
    echo_token_ids: bool
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    min_tokens: int
    include_stop: bool
    keep_special_tokens: bool


_SAMPLING = frozenset(common_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


def chat(messages: str | Sequence[Message], **options: Unpack[Options]) -> pb.GenerateRequest:
    """A conversation through the model's chat template; a string is one message of the user."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    request = _request(options)
    request.chat.SetInParent()
    for turn in turns:
        request.chat.messages.add(role=turn["role"], content=turn["content"])
    return request


def text(prompt: str, **options: Unpack[Options]) -> pb.GenerateRequest:
    """A text as it is, without a template."""
    request = _request(options)
    request.text = prompt
    return request


def tokens(ids: Sequence[int], **options: Unpack[Options]) -> pb.GenerateRequest:
    """Token ids of the model's own vocabulary."""
    request = _request(options)
    request.tokens.ids.extend(ids)
    return request


def _request(options: Options) -> pb.GenerateRequest:
    """Raises TypeError for an option that there is not, naming the nearest one."""
    for name in options:
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"no option {name!r}{hint}")
    own: dict[str, Any] = {k: v for k, v in options.items() if k not in _SAMPLING}
    sampling: dict[str, Any] = {k: v for k, v in options.items() if k in _SAMPLING}
    return pb.GenerateRequest(**own, sampling=common_pb2.SamplingParams(**sampling))
