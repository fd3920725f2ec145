"""What a token id stands for, as log-probabilities show it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvmesh.services.tokenizer.core import CodecLimits, load_codec


class Vocabulary(Protocol):
    def token(self, token_id: int) -> bytes:
        """Its UTF-8, which may be a part of a character; empty for an id that has none."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of several ids. Raises InvalidRequest for one outside the vocabulary."""
        ...


def open_vocabulary(folder: Path) -> Vocabulary:
    """Of a checkpoint folder. Raises ConfigError naming the file that is wrong."""
    return load_codec(folder, CodecLimits(cache_bytes=0))
