"""Answers as bytes: whole ones, and the chunks of a stream from templates made once per request.

A chunk is a join of a few prepared pieces and one JSON string, since it is made for each token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from json.encoder import encode_basestring_ascii as json_string
from typing import Any, Protocol

from kvmesh.services.gateway.logprobs import CompletionLogprobs, chat_logprobs
from kvmesh.services.gateway.vocabulary import Vocabulary
from kvmesh.v1 import common_pb2, inference_pb2

compact = partial(json.dumps, separators=(",", ":"))
COST_PARTS = ("queue_usd", "prefill_usd", "decode_usd", "kv_usd")
DONE = b"data: [DONE]\n\n"
_FINISH: dict[int, str] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}
_FINISH_JSON = {reason: compact(word) for reason, word in _FINISH.items()}  # of others: null


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of one answer begin with. created: Unix seconds."""

    id: str
    model: str
    created: int
    fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(slots=True)
class Choice:
    """One choice, added up from its responses."""

    text: str = ""
    logprobs: list[common_pb2.TokenLogprob] = field(default_factory=list)
    finish: int = 0
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        self.text += response.text
        self.logprobs.extend(response.logprobs)
        if response.finish_reason:
            self.finish = response.finish_reason
            self.usage = response.usage


class Answer(Protocol):
    """How one endpoint writes what was generated."""

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> bytes:
        """The body of an answer that is not streamed."""
        ...

    def opening(self, index: int) -> bytes:
        """The first event of a choice; may be empty."""
        ...

    def chunk(self, index: int, response: inference_pb2.GenerateResponse) -> bytes:
        """The events of one response, its end included."""
        ...

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The event after all choices."""
        ...


class ChatAnswer:
    def __init__(self, head: Head, vocabulary: Vocabulary, logprobs: bool, with_usage: bool):
        self._head = head
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._start, self._end = _frame(head, "chat.completion.chunk", with_usage)

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> bytes:
        made = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._content(choice.logprobs),
                "finish_reason": _FINISH.get(choice.finish),
            }
            for index, choice in enumerate(choices)
        ]
        body = {**self._head.fields("chat.completion"), "choices": made, "usage": usage}
        return compact(body).encode()

    def opening(self, index: int) -> bytes:
        delta = '{"role":"assistant","content":"","refusal":null}'
        return self._event(index, delta, "null", "null")

    def chunk(self, index: int, response: inference_pb2.GenerateResponse) -> bytes:
        events = b""
        if response.text or response.logprobs:
            logprobs = "null"
            if self._logprobs:
                logprobs = compact(self._content(response.logprobs))
            delta = f'{{"content":{json_string(response.text)}}}'
            events = self._event(index, delta, logprobs, "null")
        if response.finish_reason:
            reason = _FINISH_JSON.get(response.finish_reason, "null")
            events += self._event(index, "{}", "null", reason)
        return events

    def usage(self, usage: dict[str, Any]) -> bytes:
        return _usage_event(self._head, "chat.completion.chunk", usage)

    def _content(self, items: Sequence[common_pb2.TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": chat_logprobs(items, self._vocabulary), "refusal": None}

    def _event(self, index: int, delta: str, logprobs: str, finish: str) -> bytes:
        return (
            f'{self._start}{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish}{self._end}'
        ).encode("ascii")


class CompletionAnswer:
    """echo: for each choice the text before its output, or nothing."""

    def __init__(
        self, head: Head, vocabulary: Vocabulary, logprobs: bool, with_usage: bool,
        echo: Sequence[str],
    ) -> None:  # fmt: skip
        self._head = head
        self._vocabulary = vocabulary
        self._logprobs = logprobs
        self._echo = echo
        self._progress: dict[int, CompletionLogprobs] = {}
        self._start, self._end = _frame(head, "text_completion", with_usage)

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> bytes:
        made = [
            {
                "index": index,
                "text": (self._echo[index] if self._echo else "") + choice.text,
                "logprobs": self._content(index, choice.logprobs),
                "finish_reason": _FINISH.get(choice.finish),
            }
            for index, choice in enumerate(choices)
        ]
        body = {**self._head.fields("text_completion"), "choices": made, "usage": usage}
        return compact(body).encode()

    def opening(self, index: int) -> bytes:
        return self._event(index, self._echo[index], "null", "null") if self._echo else b""

    def chunk(self, index: int, response: inference_pb2.GenerateResponse) -> bytes:
        logprobs = "null"
        if self._logprobs and response.logprobs:
            logprobs = compact(self._content(index, response.logprobs))
        text, reason = response.text, response.finish_reason
        if not (text or reason or response.logprobs):
            return b""
        return self._event(index, text, logprobs, _FINISH_JSON.get(reason, "null"))

    def usage(self, usage: dict[str, Any]) -> bytes:
        return _usage_event(self._head, "text_completion", usage)

    def _content(
        self, index: int, items: Sequence[common_pb2.TokenLogprob]
    ) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        progress = self._progress.setdefault(index, CompletionLogprobs(self._vocabulary))
        return progress.of(items)

    def _event(self, index: int, text: str, logprobs: str, finish: str) -> bytes:
        return (
            f'{self._start}{index},"text":{json_string(text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish}{self._end}'
        ).encode("ascii")


def _frame(head: Head, kind: str, with_usage: bool) -> tuple[str, str]:
    """What stands in every chunk before the choice's index and after its finish reason."""
    fields = compact(head.fields(kind))[:-1]
    usage = ',"usage":null' if with_usage else ""
    return f'data: {fields},"choices":[{{"index":', f"}}]{usage}}}\n\n"


def _usage_event(head: Head, kind: str, usage: dict[str, Any]) -> bytes:
    body = {**head.fields(kind), "choices": [], "usage": usage}
    return b"data: " + compact(body).encode() + b"\n\n"


def usage_of(usages: Sequence[inference_pb2.Usage], num_prompts: int) -> dict[str, Any]:
    """The usage of all choices; the prompt of several choices counts once, as OpenAI counts it."""
    per_prompt = max(1, len(usages) // num_prompts)
    prompts = usages[::per_prompt]
    prompt = sum(usage.prompt_tokens for usage in prompts)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in prompts)},
        **_cost(usages),
    }


def _cost(usages: Sequence[inference_pb2.Usage]) -> dict[str, Any]:
    """What the choices took of devices; kvmesh's own fields. No sums over two kinds of clocks."""
    kinds = {usage.cost_kind for usage in usages} - {""}
    if not kinds:
        return {}
    kind = kinds.pop() if len(kinds) == 1 else "mixed"
    if kind == "mixed":
        return {"cost_kind": kind}
    told: dict[str, Any] = {"cost_kind": kind, "device_s": sum(u.device_s for u in usages)}
    if all(usage.HasField("cost_split") for usage in usages):
        told["cost_usd"] = sum(usage.cost_usd for usage in usages)
        told["cost_details"] = {
            part: sum(getattr(usage.cost_split, part) for usage in usages) for part in COST_PARTS
        }
    return told
