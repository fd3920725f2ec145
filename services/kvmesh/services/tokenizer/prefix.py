"""Encodes text in pieces and remembers each piece, so that a repeated prefix is not encoded again.

Text is cut only behind special tokens. The tokenizers library splits there before anything else
looks at the text, so the pieces' ids joined are exactly the ids of the whole. Chat turns end with
special tokens, so each turn of a conversation is a piece or a few.
"""

import re
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from sys import getsizeof
from typing import Any, NamedTuple

from tokenizers import Tokenizer

MIN_PIECE_CHARS = 128  # shorter ones cost more to look up than to encode
ENTRY_BYTES = 300  # of a cache entry, beside its text and ids


class Encoded(NamedTuple):
    """cached_chars: length of the text's prefix whose ids came from the cache."""

    ids: list[int]
    cached_chars: int


class _Piece(NamedTuple):
    """before: the special token that ends the piece before; empty for the first.

    salt: whose it is; nobody else's request is faster for it.
    """

    before: str
    text: str
    salt: str = ""


class PieceCache:
    """Ids of pieces, the least recently used dropped first.

    lock: for callers in several threads.
    """

    def __init__(self, max_bytes: int, lock: AbstractContextManager[Any] | None = None) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock: AbstractContextManager[Any] = nullcontext() if lock is None else lock
        self._entries: OrderedDict[_Piece, array[int]] = OrderedDict()

    def get(self, piece: _Piece) -> list[int] | None:
        with self._lock:
            ids = self._entries.get(piece)
            if ids is None:
                return None
            self._entries.move_to_end(piece)
            return ids.tolist()

    def put(self, piece: _Piece, ids: list[int]) -> None:
        """A piece that alone is over the limit is not kept."""
        packed = array("I", ids)
        size = _entry_bytes(piece, packed)
        with self._lock:
            if size > self.max_bytes or piece in self._entries:
                return
            self._entries[piece] = packed
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= _entry_bytes(*self._entries.popitem(last=False))


def _entry_bytes(piece: _Piece, ids: "array[int]") -> int:
    return getsizeof(piece.text) + getsizeof(piece.salt) + ids.itemsize * len(ids) + ENTRY_BYTES


class PrefixEncoder:
    """Text to ids, without the tokens that a post-processor adds around them."""

    def __init__(self, tokenizer: Tokenizer, cache: PieceCache) -> None:
        self._tokenizer = tokenizer
        self._cache = cache
        cuts = _safe_cuts(tokenizer) if cache.max_bytes else None
        self._cuts = cuts if cuts is not None and self._is_exact(cuts) else None

    @property
    def caches(self) -> bool:
        """False if this tokenizer's pieces cannot be told apart safely, or without a budget."""
        return self._cuts is not None

    def encode(self, text: str, salt: str = "") -> Encoded:
        if self._cuts is None:
            return Encoded(self._plain(text), 0)
        ids: list[int] = []
        cached_chars = 0
        from_start = True
        for piece in _pieces(text, self._cuts, salt=salt):
            known = self._cache.get(piece) if len(piece.text) >= MIN_PIECE_CHARS else None
            from_start = from_start and known is not None
            if known is None:
                known = self._encode_piece(piece)
            if from_start:
                cached_chars += len(piece.text)
            ids += known
        return Encoded(ids, cached_chars)

    def _encode_piece(self, piece: _Piece) -> list[int]:
        ids = self._plain(piece.before + piece.text)
        if piece.before:
            del ids[0]
        if len(piece.text) >= MIN_PIECE_CHARS:
            self._cache.put(piece, ids)
        return ids

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _is_exact(self, cuts: re.Pattern[str]) -> bool:
        """Tries the cuts on what normalizers and prefix spaces are known to disturb."""
        token = _shortest_cut(self._tokenizer)
        if self._plain(token) != [self._tokenizer.token_to_id(token)]:
            return False
        parts = ("a b", " a", "a ", "\n\n", " ", "e\u0301x", "x", "\u2581y", "", "Z.")
        for left in parts:
            for right in parts:
                text = f"{left}{token}{right}{token}{token}{left}"
                joined: list[int] = []
                for piece in _pieces(text, cuts, min_chars=1):
                    ids = self._plain(piece.before + piece.text)
                    joined += ids[1:] if piece.before else ids
                if joined != self._plain(text):
                    return False
        return True


def _pieces(
    text: str, cuts: re.Pattern[str], min_chars: int = MIN_PIECE_CHARS, salt: str = ""
) -> Iterator[_Piece]:
    """The same prefix is cut into the same pieces, whatever follows it."""
    start, before = 0, ""
    for match in cuts.finditer(text):
        if match.end() - start >= min_chars:
            yield _Piece(before, text[start : match.end()], salt)
            start, before = match.end(), match[0]
    if start < len(text):
        yield _Piece(before, text[start:], salt)


def _cut_tokens(tokenizer: Tokenizer) -> list[str] | None:
    """Tokens split off the raw text, the longest first; None if one looks at its neighbours."""
    added = tokenizer.get_added_tokens_decoder().values()
    raw = [token for token in added if not token.normalized and token.content]
    if any(token.single_word or token.lstrip or token.rstrip for token in added):
        return None
    return sorted((token.content for token in raw), key=len, reverse=True)


def _safe_cuts(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    tokens = _cut_tokens(tokenizer)
    if not tokens:
        return None
    return re.compile("|".join(map(re.escape, tokens)))


def _shortest_cut(tokenizer: Tokenizer) -> str:
    return (_cut_tokens(tokenizer) or [""])[-1]
