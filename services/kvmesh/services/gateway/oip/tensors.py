"""The tensors of the Open Inference Protocol: read out of a request, written into a response. Pure.

Their names are those of Triton's vLLM backend; each input holds one element.
"""

import difflib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvmesh.oip import inference_pb2 as pb
from kvmesh.services.common.errors import InvalidRequest

INPUTS: Mapping[str, str] = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "streaming": "BOOL",  # another name of `stream`
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_cumulative_logprob": "BOOL",
    "return_logprobs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
OUTPUTS: Mapping[str, str] = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "logprobs": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
_LENGTH = struct.Struct("<I")
_CONTENTS = {"BYTES": "bytes_contents", "BOOL": "bool_contents", "FP32": "fp32_contents",
             "UINT32": "uint_contents"}  # fmt: skip
_FORMATS = {"FP32": "f", "UINT32": "I"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """values: one element for each choice."""

    name: str
    values: Sequence[Any]


def read_inputs(request: pb.ModelInferRequest) -> dict[str, bytes | bool]:
    """The element of each input that is there.

    Raises InvalidRequest for an input that is unknown, double, not of its datatype or not one
    element, and for contents that do not fit.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries, must have one for each of the "
            f"{len(request.inputs)} inputs"
        )
    found: dict[str, bytes | bool] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        _check_input(tensor)
        if name in found:
            raise InvalidRequest(f"input '{name}' is there twice")
        if raw and tensor.HasField("contents"):
            raise InvalidRequest(f"input '{name}' has contents, and raw_input_contents is set")
        found[name] = _raw_element(name, raw[index]) if raw else _typed_element(tensor)
    return found


def write_outputs(response: pb.ModelInferResponse, tensors: Sequence[Tensor], raw: bool) -> None:
    """Adds outputs, with raw contents or with typed ones."""
    for tensor in tensors:
        datatype = OUTPUTS[tensor.name]
        output = response.outputs.add(
            name=tensor.name, datatype=datatype, shape=[len(tensor.values)]
        )
        if raw:
            response.raw_output_contents.append(_raw(datatype, tensor.values))
        else:
            getattr(output.contents, _CONTENTS[datatype]).extend(tensor.values)


def requested_outputs(request: pb.ModelInferRequest) -> frozenset[str]:
    """Empty if the request names none. Raises InvalidRequest for a name that there is not."""
    for output in request.outputs:
        _check_name("output", output.name, OUTPUTS)
        _check_no_parameters("output", output)
    return frozenset(output.name for output in request.outputs)


def _check_input(tensor: pb.ModelInferRequest.InferInputTensor) -> None:
    _check_name("input", tensor.name, INPUTS)
    _check_no_parameters("input", tensor)
    if tensor.datatype != INPUTS[tensor.name]:
        raise InvalidRequest(
            f"input '{tensor.name}' has datatype {tensor.datatype[:20]!r}, "
            f"must be {INPUTS[tensor.name]}"
        )
    if not 1 <= len(tensor.shape) <= 2 or any(size != 1 for size in tensor.shape):
        shape = list(tensor.shape[:8])
        raise InvalidRequest(f"input '{tensor.name}' has shape {shape}, must be [1] or [1, 1]")


def _check_name(kind: str, name: str, known: Mapping[str, str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name[:64], known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the {kind}s are {', '.join(known)}"
        raise InvalidRequest(f"no {kind} '{name[:64]}'; {hint}")


def _check_no_parameters(kind: str, tensor: Any) -> None:
    """Shared memory and classification are asked for by parameters of a tensor."""
    for name in tensor.parameters:
        raise InvalidRequest(
            f"{kind} '{tensor.name}' has the parameter '{name[:64]}', which is not supported: "
            "contents travel in the message, and nothing is classified"
        )


def _raw_element(name: str, data: bytes) -> bytes | bool:
    if INPUTS[name] == "BOOL":
        if data not in (b"\x00", b"\x01"):
            raise InvalidRequest(
                f"the raw contents of input '{name}' are {len(data)} bytes, must be one, 0 or 1"
            )
        return data == b"\x01"
    if len(data) < _LENGTH.size:
        raise InvalidRequest(
            f"the raw contents of input '{name}' are {len(data)} bytes, "
            f"must begin with a length of {_LENGTH.size}"
        )
    (size,) = _LENGTH.unpack_from(data)
    rest = len(data) - _LENGTH.size
    if size != rest:
        raise InvalidRequest(
            f"the raw contents of input '{name}' give a length of {size} bytes, {rest} follow"
        )
    return data[_LENGTH.size :]


def _typed_element(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes | bool:
    wanted = _CONTENTS[tensor.datatype]
    for field, values in tensor.contents.ListFields():
        if field.name != wanted:
            raise InvalidRequest(
                f"input '{tensor.name}' has {field.name}, must have {wanted} "
                f"for its datatype {tensor.datatype}"
            )
        if len(values) == 1:
            element: bytes | bool = values[0]
            return element
    count = len(getattr(tensor.contents, wanted))
    raise InvalidRequest(f"input '{tensor.name}' has {count} elements, must have 1")


def _raw(datatype: str, values: Sequence[Any]) -> bytes:
    if datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(value)) + value for value in values)
    return struct.pack(f"<{len(values)}{_FORMATS[datatype]}", *values)
