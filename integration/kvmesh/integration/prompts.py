"""What codecs are compared on: generated documents with questions, and plain texts."""

import itertools
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer

from kvmesh.integration.needle import MAX_FACTS, MAX_TOKENS, MIN_TOKENS, make_case
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.tokenizer.core import TOKENIZER_FILE, CodecLimits, TextCodec, load_codec

FIRST_SEED = 40_000  # of the documents; no other evaluation starts there
BUNDLED = "bundled"


class PromptSet:
    """Text to token sequences for one checkpoint. Raises ConfigError if it has no tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._text: TextCodec = load_codec(folder, CodecLimits(cache_bytes=0))
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))

    def bundled(self, tokens: int, length: int) -> list[list[int]]:
        """About `tokens` in sequences of at most `length`: half from documents with a question and
        its answer, as the model would be asked, and half from texts of several kinds."""
        sequences: list[list[int]] = []
        documents, texts = self._documents(length), self._texts(_bundled_texts(), length)
        for source, share in ((documents, tokens // 2), (texts, tokens)):
            for sequence in source:
                if sum(map(len, sequences)) >= share:
                    break
                sequences.append(sequence)
        return sequences

    def from_file(self, path: Path, tokens: int, length: int) -> list[list[int]]:
        """From a file of texts: JSON lines with a string or an object with `text`, else the texts
        of a plain file, which empty lines part. Raises ConfigError naming what is wrong."""
        sequences: list[list[int]] = []
        for sequence in self._texts(read_texts(path), length):
            if sum(map(len, sequences)) >= tokens:
                break
            sequences.append(sequence)
        if not sequences:
            raise ConfigError(f"{path} holds no text of more than {BLOCK_SIZE} tokens")
        return sequences

    def document(self, seed: int, length: int) -> list[int]:
        """A document with facts, a question and its answer: at most, and nearly, `length` ids."""
        target = min(max(length - 32, MIN_TOKENS), MAX_TOKENS)
        case = make_case(seed, target, seed % MAX_FACTS + 1, self._count)
        return [*self._prompt(case.prompt), *self._encode(case.answer)][:length]

    def _documents(self, length: int) -> Iterator[list[int]]:
        for seed in itertools.count(FIRST_SEED):
            yield self.document(seed, length)

    def _texts(self, texts: list[str], length: int) -> Iterator[list[int]]:
        for text in texts:
            ids = self._text.encode_text(text).ids
            for start in range(0, len(ids), length):
                if len(ids) - start > BLOCK_SIZE:
                    yield list(ids[start : start + length])

    def _prompt(self, text: str) -> list[int]:
        if not self._text.has_template:
            return list(self._text.encode_text(text).ids)
        return list(self._text.encode_chat([{"role": "user", "content": text}]).ids)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _count(self, text: str) -> int:
        return len(self._encode(text))


def load_sequences(folder: Path, prompts: Path | None, tokens: int, length: int) -> list[list[int]]:
    """About `tokens` of the file, or of the bundled set, for the checkpoint in `folder`."""
    made = PromptSet(folder)
    return made.from_file(prompts, tokens, length) if prompts else made.bundled(tokens, length)


def _bundled_texts() -> list[str]:
    text = (files("kvmesh.integration") / "texts" / "check.txt").read_text("utf-8")
    return [part.strip() for part in text.split("\n====\n")]


def read_texts(path: Path) -> list[str]:
    """The texts of a file; see PromptSet.from_file."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if path.suffix != ".jsonl":
        return [part.strip() for part in content.split("\n\n") if part.strip()]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: is not JSON: {error.msg}") from error
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str) or not text:
            raise ConfigError(f'{path}, line {number}: must be a text or an object with "text"')
        texts.append(text)
    return texts
