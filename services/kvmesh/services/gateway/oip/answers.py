"""What was generated as ModelInferResponses: whole, or piece by piece. Pure."""

import json
import math
from collections.abc import Sequence

from kvmesh.oip import inference_pb2 as pb
from kvmesh.services.gateway.answers import Choice
from kvmesh.services.gateway.logprobs import LOWEST
from kvmesh.services.gateway.oip.requests import Inference
from kvmesh.services.gateway.oip.tensors import Tensor, write_outputs
from kvmesh.services.gateway.vocabulary import Vocabulary
from kvmesh.v1 import common_pb2, inference_pb2

VERSION = "1"  # a mesh has one version of its model
_FINISH: dict[int, bytes] = {
    common_pb2.FINISH_REASON_STOP: b"stop",
    common_pb2.FINISH_REASON_LENGTH: b"length",
}


class InferAnswer:
    """Adds up one request's responses and writes what its caller is told."""

    def __init__(self, inference: Inference, vocabulary: Vocabulary) -> None:
        self._inference = inference
        self._vocabulary = vocabulary
        count = len(inference.plan.generate)
        self.choices = [Choice() for _ in range(count)]
        self._said = [0] * count  # tokens that responses have counted
        self._unfinished = count
        self._trace_id = ""

    def add(self, index: int, response: inference_pb2.GenerateResponse) -> None:
        self.choices[index].add(response)
        self._trace_id = response.trace_id or self._trace_id
        self._unfinished -= bool(response.finish_reason)

    def whole(self) -> pb.ModelInferResponse:
        pieces = [
            Choice(self._inference.text_input + c.text, c.logprobs, c.finish, c.usage)
            for c in self.choices
        ]
        counts = [choice.usage.completion_tokens for choice in self.choices]
        return self._response(pieces, counts)

    def piece(self, index: int, response: inference_pb2.GenerateResponse) -> pb.ModelInferResponse:
        """What is new, which was added before; of the other choices nothing is."""
        pieces = [Choice() for _ in self.choices]
        pieces[index].add(response)
        counts = [0] * len(pieces)
        counts[index] = len(response.token_ids)
        if response.finish_reason:  # the token that ended it is among the ids or not
            counts[index] = max(0, response.usage.completion_tokens - self._said[index])
        self._said[index] += counts[index]
        made = self._response(pieces, counts)
        made.parameters["triton_final_response"].bool_param = self._unfinished == 0
        return made

    def _response(self, pieces: Sequence[Choice], counts: Sequence[int]) -> pb.ModelInferResponse:
        inference = self._inference
        made = pb.ModelInferResponse(
            model_name=inference.model, model_version=VERSION, id=inference.id
        )
        tensors = [
            Tensor("text_output", [piece.text.encode() for piece in pieces]),
            Tensor("finish_reason", [_FINISH.get(piece.finish, b"") for piece in pieces]),
            Tensor("cumulative_logprob", [_sum(choice) for choice in self.choices]),
            Tensor("logprobs", [self._logprobs(piece) for piece in pieces]),
            Tensor("num_input_tokens", [self.choices[0].usage.prompt_tokens]),
            Tensor("num_output_tokens", counts),
        ]
        wanted = [tensor for tensor in tensors if tensor.name in inference.outputs]
        write_outputs(made, wanted, inference.raw)
        if self._trace_id and not self._unfinished:
            made.parameters["kvmesh_trace_id"].string_param = self._trace_id
        return made

    def _logprobs(self, piece: Choice) -> bytes:
        """JSON as Triton's vLLM backend writes it: an object of token ids for each position."""
        return json.dumps([self._position(item) for item in piece.logprobs]).encode()

    def _position(self, item: common_pb2.TokenLogprob) -> dict[str, dict[str, object]]:
        """rank: from 1, null for a token that is not among the most likely ones."""
        ranked = enumerate(zip(item.top_token_ids, item.top_logprobs, strict=True), start=1)
        found: dict[int, tuple[float, int | None]] = {id_: (p, rank) for rank, (id_, p) in ranked}
        found.setdefault(item.token_id, (item.logprob, None))
        return {
            str(token_id): {
                "logprob": max(value, LOWEST),
                "rank": rank,
                "decoded_token": self._vocabulary.token(token_id).decode(errors="replace"),
            }
            for token_id, (value, rank) in found.items()
        }


def _sum(choice: Choice) -> float:
    return math.fsum(max(item.logprob, LOWEST) for item in choice.logprobs)
