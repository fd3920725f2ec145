"""A ModelInferRequest as what the mesh is asked. Pure.

Sampling parameters have the names of vLLM's, which are those of this gateway's /v1/completions, and
its checks hold for both.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmesh.oip import inference_pb2 as pb
from kvmesh.services.common.errors import InvalidRequest
from kvmesh.services.gateway.errors import ApiError
from kvmesh.services.gateway.oip.tensors import read_inputs, requested_outputs
from kvmesh.services.gateway.requests import Plan, plan_completion
from kvmesh.services.gateway.schema import CompletionRequest, parse_completion

MAX_PARAMETERS_BYTES = 256 << 10
MAX_ID_BYTES = 1024
ALWAYS = ("text_output", "finish_reason")  # of a request that names no outputs
_SWITCHES = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens",
             "num_output_tokens")  # fmt: skip
# What a prompt and its delivery are made of has tensors of its own.
_OTHERWISE = frozenset(
    {"model", "prompt", "stream", "stream_options", "echo", "suffix", "user"}
)  # fmt: skip
SAMPLING = frozenset(CompletionRequest.model_fields) - _OTHERWISE
# Of the protocol and its extensions; what asks for nothing is taken.
_TIMEOUT = "timeout"  # microseconds
_FINAL = "triton_enable_empty_final_response"
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "priority": (0,),
    "sequence_id": (0, ""),
    "sequence_start": (False,),
    "sequence_end": (False,),
}
_STRINGS = frozenset({"stop", "cache_salt"})  # a string here is not a number in quotes


@dataclass(frozen=True, slots=True)
class Inference:
    """One request. plan: what the mesh runs, a GenerateRequest for each choice.

    text_input: given back before the output, or empty. outputs: names of the tensors of a response.
    raw: contents are raw. timeout_s: of its own; None if it names none.
    """

    id: str
    model: str
    plan: Plan
    stream: bool
    text_input: str
    outputs: frozenset[str]
    raw: bool
    timeout_s: float | None


def read_request(request: pb.ModelInferRequest, request_id: str, streaming: bool) -> Inference:
    """request_id: under which the mesh knows it. streaming: whether there may be many responses.

    Raises InvalidRequest naming what is wrong.
    """
    if not request.model_name:
        raise InvalidRequest("model_name is empty")
    inputs = read_inputs(request)
    parameters = {name: _value(name, value) for name, value in request.parameters.items()}
    timeout_s = _timeout_s(parameters)
    stream = _stream(inputs, streaming)
    outputs = _outputs(request, inputs)
    text = _text(inputs, "text_input")
    if not text:
        raise InvalidRequest("input 'text_input' is missing or empty")
    if len(request.id.encode()) > MAX_ID_BYTES:
        raise InvalidRequest(f"id has over {MAX_ID_BYTES} bytes")
    sampling = _sampling(parameters, _text(inputs, "sampling_parameters"))
    return Inference(
        id=request.id,
        model=request.model_name,
        plan=_plan(request.model_name, text, sampling, outputs, request_id),
        stream=stream,
        text_input=text if _prepends(inputs, stream) else "",
        outputs=outputs,
        raw=bool(request.raw_input_contents),
        timeout_s=timeout_s,
    )


def _plan(
    model: str, text: str, sampling: Mapping[str, Any], outputs: frozenset[str], request_id: str
) -> Plan:
    body = {**sampling, "model": model, "prompt": text}
    if outputs & {"cumulative_logprob", "logprobs"}:
        body.setdefault("logprobs", 0)
    try:
        plan = plan_completion(parse_completion(json.dumps(body).encode()), request_id)
    except ApiError as error:
        raise InvalidRequest(error.message) from None
    if "num_output_tokens" in outputs:
        for one in plan.generate:
            one.echo_token_ids = True
    return plan


def _stream(inputs: Mapping[str, bytes | bool], streaming: bool) -> bool:
    given = {bool(inputs[name]) for name in ("stream", "streaming") if name in inputs}
    if len(given) > 1:
        raise InvalidRequest("inputs 'stream' and 'streaming' say different things; send one")
    stream = given == {True}
    if stream and not streaming:
        raise InvalidRequest("input 'stream' is true, but ModelInfer has one response; "
                             "call ModelStreamInfer")  # fmt: skip
    return stream


def _prepends(inputs: Mapping[str, bytes | bool], stream: bool) -> bool:
    """As Triton's vLLM backend has it: before the whole output, unless the caller says no."""
    excluded = inputs.get("exclude_input_in_output", stream)
    if stream and not excluded:
        raise InvalidRequest(
            "input 'exclude_input_in_output' is false, which a streamed output cannot be"
        )
    return not excluded


def _outputs(request: pb.ModelInferRequest, inputs: Mapping[str, bytes | bool]) -> frozenset[str]:
    named = requested_outputs(request)
    switched = {name for name in _SWITCHES if inputs.get(f"return_{name}")}
    return named or frozenset({*ALWAYS, *switched})


def _text(inputs: Mapping[str, bytes | bool], name: str) -> str:
    data = inputs.get(name, b"")
    assert isinstance(data, bytes)  # read_inputs has checked the datatype
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"input '{name}' is not UTF-8 at byte {error.start}") from None


def _value(name: str, parameter: pb.InferParameter) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidRequest(f"parameter '{name[:64]}' has no value")
    return getattr(parameter, kind)


def _timeout_s(parameters: dict[str, Any]) -> float | None:
    """Takes out of `parameters` those that are not sampling's, and checks them."""
    parameters.pop(_FINAL, None)  # a stream's last response has triton_final_response anyway
    for name, neutral in _NEUTRAL.items():
        value = parameters.pop(name, neutral[0])
        if value not in neutral:
            raise InvalidRequest(
                f"parameter '{name}' is {str(value)[:64]!r}: requests here have neither state "
                "nor priority"
            )
    microseconds = parameters.pop(_TIMEOUT, None)
    if microseconds is None or microseconds == 0:  # 0: none, as Triton has it
        return None
    if isinstance(microseconds, bool | str) or not 0 < microseconds < 1 << 62:
        raise InvalidRequest(
            f"parameter 'timeout' is {str(microseconds)[:64]}, must be microseconds > 0"
        )
    return float(microseconds) / 1e6


def _sampling(parameters: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Parameters of the request, and over them those of the tensor, a JSON object."""
    merged = dict(parameters)
    if text:
        merged |= _json_object(text)
    for name in merged:
        if name not in SAMPLING:
            near = difflib.get_close_matches(name[:64], SAMPLING, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "docs/oip.md lists them"
            raise InvalidRequest(f"no sampling parameter '{name[:64]}'; {hint}")
    return {name: _plain(name, value) for name, value in merged.items()}


def _json_object(text: str) -> dict[str, Any]:
    if len(text) > MAX_PARAMETERS_BYTES:
        raise InvalidRequest(
            f"input 'sampling_parameters' has {len(text)} characters, "
            f"must have at most {MAX_PARAMETERS_BYTES}"
        )
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidRequest("input 'sampling_parameters' is not a JSON object")
    return found


def _plain(name: str, value: Any) -> Any:
    """A number, truth value or object that came as a string is what the string says."""
    if not isinstance(value, str) or name in _STRINGS:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
