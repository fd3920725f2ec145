"""A checkpoint's tokenizer: prompts to ids, ids to text."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kvmesh.services.common.errors import ConfigError, InvalidRequest
from kvmesh.services.tokenizer.chat import ChatTemplate, load_chat_template, special_tokens
from kvmesh.services.tokenizer.detokenize import Detokenizer
from kvmesh.services.tokenizer.pieces import PieceTable
from kvmesh.services.tokenizer.prefix import Encoded, PieceCache, PrefixEncoder

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
MODEL_CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class CodecLimits:
    """max_text_bytes: of one prompt, in UTF-8. cache_bytes: for pieces of prompts; 0: no cache."""

    max_text_bytes: int = 4 << 20
    cache_bytes: int = 64 << 20


class TextCodec:
    """Encodes and decodes for one model. Its methods may be called from several threads.

    vocab_size: ids are below it. It is the model's, which may be padded beyond the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        template: ChatTemplate | None,
        encoder: PrefixEncoder,
        limits: CodecLimits,
        bos_token: str | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._template = template
        self._encoder = encoder
        self._limits = limits
        self._bos_id = None if bos_token is None else tokenizer.token_to_id(bos_token)
        self._frame = _frame(tokenizer)
        self._pieces = PieceTable(tokenizer, vocab_size)

    @property
    def caches_prefixes(self) -> bool:
        return self._encoder.caches

    @property
    def has_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return self._template is not None

    def encode_text(self, text: str, salt: str = "") -> Encoded:
        """`text` as it is, with the tokens that the model wants around it.

        salt: of the cache; what was encoded under another one is not found.
        Raises InvalidRequest if it is empty or too long.
        """
        self._check_size(text)
        if self._frame is None:
            return Encoded(self._with_bos(self._tokenizer.encode(text).ids), 0)
        encoded = self._encoder.encode(text, salt)
        before, after = self._frame
        return Encoded(self._with_bos([*before, *encoded.ids, *after]), encoded.cached_chars)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        salt: str = "",
    ) -> Encoded:
        """`messages` (role, content ...) through the chat template, up to where the answer begins.

        Raises InvalidRequest if there are none, they are too long, or the template refuses them.
        """
        if not messages:
            raise InvalidRequest("the chat prompt has no messages, must have at least 1")
        if self._template is None:
            raise InvalidRequest("this model has no chat template; send the prompt as text")
        contents = "".join(message["content"] for message in messages)
        if contents:  # checked before the template works on it; that may add to it, or be all of it
            self._check_size(contents)
        text = self._template.render(messages, tools)
        self._check_size(text)
        return self._encoder.encode(text, salt)

    def decode(self, token_ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        """Raises InvalidRequest for an id outside the vocabulary."""
        self.check_ids(token_ids)
        return self._tokenizer.decode(token_ids, skip_special_tokens=not keep_special_tokens)

    def token(self, token_id: int) -> bytes:
        """The UTF-8 of one token, which may be a part of a character."""
        return self._pieces.token_bytes(token_id)

    def open_detokenizer(
        self,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        keep_special_tokens: bool = False,
    ) -> Detokenizer:
        """Raises InvalidRequest for an empty stop string."""
        if not all(stop):
            raise InvalidRequest("a stop string is empty, must have at least 1 character")
        return Detokenizer(self._pieces.open(keep_special_tokens), stop, include_stop)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequest for an id outside the vocabulary."""
        if token_ids and max(token_ids) >= self.vocab_size:
            raise InvalidRequest(
                f"token id {max(token_ids)} is outside the vocabulary of {self.vocab_size}"
            )

    def _check_size(self, text: str) -> None:
        if not text:
            raise InvalidRequest("the prompt is empty, must have at least 1 character")
        limit = self._limits.max_text_bytes
        # A character has at most four bytes, so most texts need not be encoded to know.
        if len(text) * 4 > limit and (size := len(text.encode())) > limit:
            raise InvalidRequest(f"the prompt has {size} bytes, must have at most {limit}")

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self._bos_id is None or ids[:1] == [self._bos_id]:
            return ids
        return [self._bos_id, *ids]


def load_codec(
    folder: Path,
    limits: CodecLimits,
    lock: AbstractContextManager[Any] | None = None,
    now: Callable[[], datetime] | None = None,
) -> TextCodec:
    """The tokenizer of a checkpoint folder. Raises ConfigError naming the file that is wrong.

    lock: guards the cache, for callers in several threads. now: for templates that print the date.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise ConfigError(f"{folder} holds no {TOKENIZER_FILE}; a fast tokenizer is needed")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no class of its own
        raise ConfigError(f"{file} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _json_object(folder / TOKENIZER_CONFIG_FILE)
    bos_token = special_tokens(config).get("bos_token") if config.get("add_bos_token") else None
    return TextCodec(
        tokenizer,
        _vocab_size(tokenizer, _json_object(folder / MODEL_CONFIG_FILE)),
        load_chat_template(folder, config, now),
        PrefixEncoder(tokenizer, PieceCache(limits.cache_bytes, lock)),
        limits,
        bos_token,
    )


def _vocab_size(tokenizer: Tokenizer, model_config: Mapping[str, Any]) -> int:
    inner = model_config.get("text_config")
    size = (inner if isinstance(inner, dict) else model_config).get("vocab_size")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return max(largest + 1, size if isinstance(size, int) else 0)


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """Ids that the post-processor puts before and after a text; None if it does more than that."""
    frames = []
    for probe in ("a", "b c", "1"):
        bare = tokenizer.encode(probe, add_special_tokens=False).ids
        framed = tokenizer.encode(probe, add_special_tokens=True).ids
        starts = (i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        start = next(starts, None)
        if start is None or not bare:
            return None
        frames.append((framed[:start], framed[start + len(bare) :]))
    return frames[0] if all(frame == frames[0] for frame in frames) else None


def _json_object(path: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, must be an object")
    return value
