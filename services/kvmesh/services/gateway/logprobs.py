"""Log-probabilities in the two shapes that OpenAI's API has for them. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from kvmesh.services.gateway.vocabulary import Vocabulary
from kvmesh.v1 import common_pb2

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


def chat_logprobs(
    items: Iterable[common_pb2.TokenLogprob], vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """The `content` list of a chat choice's logprobs."""
    return [
        {
            **_chat_token(item.token_id, item.logprob, vocabulary),
            "top_logprobs": [
                _chat_token(token_id, value, vocabulary)
                for token_id, value in zip(item.top_token_ids, item.top_logprobs, strict=True)
            ],
        }
        for item in items
    ]


def _chat_token(token_id: int, value: float, vocabulary: Vocabulary) -> dict[str, Any]:
    raw = vocabulary.token(token_id)
    return {
        "token": raw.decode(errors="replace"),
        "logprob": max(value, LOWEST),
        "bytes": list(raw),
    }


class CompletionLogprobs:
    """Of one choice of /v1/completions; offsets count characters of its text so far."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._offset = 0

    def of(self, items: Sequence[common_pb2.TokenLogprob]) -> dict[str, Any]:
        tokens = [self._name(item.token_id) for item in items]
        offsets = []
        for item in items:
            offsets.append(self._offset)
            self._offset += len(self._vocabulary.token(item.token_id).decode(errors="ignore"))
        return {
            "tokens": tokens,
            "token_logprobs": [max(item.logprob, LOWEST) for item in items],
            "top_logprobs": [self._top(item) for item in items],
            "text_offset": offsets,
        }

    def _top(self, item: common_pb2.TokenLogprob) -> dict[str, float]:
        """The most likely tokens, and always the one that was said."""
        pairs = dict(zip(item.top_token_ids, item.top_logprobs, strict=True))
        pairs.setdefault(item.token_id, item.logprob)
        return {self._name(token_id): max(value, LOWEST) for token_id, value in pairs.items()}

    def _name(self, token_id: int) -> str:
        raw = self._vocabulary.token(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # a part of a character, written as OpenAI's API writes it
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
