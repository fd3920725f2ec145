"""All responses of one request, added up."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from kvmesh.v1 import common_pb2
from kvmesh.v1 import inference_pb2 as pb


@dataclass(slots=True)
class Answer:
    """finish_reason: stop, length ..., empty until the end; usage: None until then."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # with echo_token_ids
    logprobs: list[common_pb2.TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    request_id: str = ""
    trace_id: str = ""
    usage: pb.Usage | None = None

    @classmethod
    def of(cls, responses: Iterable[pb.GenerateResponse]) -> Self:
        answer = cls()
        for response in responses:
            answer.add(response)
        return answer

    def add(self, response: pb.GenerateResponse) -> None:
        self.text += response.text
        self.token_ids += response.token_ids
        self.logprobs += response.logprobs
        self.request_id = response.request_id or self.request_id
        self.trace_id = response.trace_id or self.trace_id
        if response.finish_reason:
            name = common_pb2.FinishReason.Name(response.finish_reason)
            self.finish_reason = name.removeprefix("FINISH_REASON_").lower()
            self.usage = response.usage
