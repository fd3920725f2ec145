"""Ids to text one at a time, so that the parts joined are what decoding all ids at once gives.

Byte-level and byte-fallback decoders, which nearly all models have, are followed exactly and at a
constant cost per id. Any other decoder is asked again about a short window of ids.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

MAX_WINDOW = 32  # ids that a decoder of unknown kind may hold back

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


class IncrementalDecoder(Protocol):
    """The text of one sequence as its ids come."""

    def feed(self, token_id: int) -> str:
        """The text that is now certain: no later id changes it."""
        ...

    def tail(self) -> str:
        """Text held back that becomes certain if the sequence ends here. Changes nothing."""
        ...

    def flush(self) -> str:
        """The text that was held back; no id follows."""
        ...


class _ByteLevelDecoder:
    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._pieces[token_id])

    def tail(self) -> str:
        return ""  # all that is held is a part of a character

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteFallbackDecoder:
    """Holds a run of byte tokens until it ends: one bad byte turns the whole run into U+FFFD."""

    def __init__(self, pieces: Sequence[str | int | None], strip: str, num_strip: int) -> None:
        self._pieces = pieces
        self._strip = strip
        self._num_strip = num_strip  # leading characters still to drop
        self._run = bytearray()

    def feed(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        return self._out(self._end_run() + piece)

    def tail(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            return ""
        return _stripped(text, self._strip, self._num_strip)[0]

    def flush(self) -> str:
        return self._out(self._end_run())

    def _end_run(self) -> str:
        if not self._run:
            return ""
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = _REPLACEMENT * len(self._run)
        self._run.clear()
        return text

    def _out(self, text: str) -> str:
        if self._num_strip:
            text, self._num_strip = _stripped(text, self._strip, self._num_strip)
        return text


def _stripped(text: str, strip: str, count: int) -> tuple[str, int]:
    """`text` without its leading `strip`, at most `count` times; and how many may still come."""
    while count and text:
        if not text.startswith(strip):
            return text, 0
        text = text[len(strip) :]
        count -= 1
    return text, count


class _WindowDecoder:
    """Decodes the last ids with and without the newest ones; the difference is their text."""

    def __init__(self, decode: Callable[[list[int]], str], skipped: frozenset[int]) -> None:
        self._decode = decode
        self._skipped = skipped
        self._window: list[int] = []
        self._num_said = 0  # ids at the window's start whose text is out
        self._said = ""  # their text

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        too_long = len(self._window) - self._num_said >= MAX_WINDOW
        unfinished = text.endswith(_REPLACEMENT) or len(text) <= len(self._said)
        if not too_long and (unfinished or not text.startswith(self._said)):
            return ""
        return self._advance(text)

    def tail(self) -> str:
        return ""

    def flush(self) -> str:
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[len(self._said) :]
        self._window = self._window[self._num_said :]
        self._num_said = len(self._window)
        self._said = self._decode(self._window)
        return new


@dataclass(frozen=True, slots=True)
class _Chain:
    """A byte-fallback decoder as tokenizer.json writes it."""

    replacements: tuple[tuple[str, str], ...]
    strip: str = ""
    num_strip: int = 0


class PieceTable:
    """What each id stands for; made once per tokenizer.

    vocab_size: ids below it may be fed; those that no token has are silent.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        tokens = [tokenizer.id_to_token(i) for i in range(vocab_size)]
        self._special = frozenset(i for i, token in enumerate(tokens) if token in special)
        self._open_visible, self._open_all = self._openers(tokenizer, tokens)
        self._tokens = tokens
        self._decode = _decode_with(tokenizer)
        self._bytes = _bytes_of(json.loads(tokenizer.to_str())["decoder"])

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of one token, special ones included; it may be a part of a character."""
        token = self._tokens[token_id] if token_id < len(self._tokens) else None
        if token is None:
            return b""
        found = self._bytes(token)
        return self._decode([token_id]).encode() if found is None else found

    def open(self, keep_special_tokens: bool = False) -> IncrementalDecoder:
        return self._open_all() if keep_special_tokens else self._open_visible()

    def _openers(
        self, tokenizer: Tokenizer, tokens: list[str | None]
    ) -> tuple[Callable[[], IncrementalDecoder], Callable[[], IncrementalDecoder]]:
        decoder: dict[str, Any] | None = json.loads(tokenizer.to_str())["decoder"]
        if decoder is not None and decoder["type"] == "ByteLevel":
            raw = _byte_pieces(tokens)
            shown = [b"" if i in self._special else piece for i, piece in enumerate(raw)]
            return lambda: _ByteLevelDecoder(shown), lambda: _ByteLevelDecoder(raw)
        chain = _byte_fallback_chain(decoder)
        if chain is not None:
            kept = _fallback_pieces(tokens, chain)
            seen = [None if i in self._special else piece for i, piece in enumerate(kept)]
            return (
                lambda: _ByteFallbackDecoder(seen, chain.strip, chain.num_strip),
                lambda: _ByteFallbackDecoder(kept, chain.strip, chain.num_strip),
            )
        return (
            lambda: _WindowDecoder(_decode_with(tokenizer), self._special),
            lambda: _WindowDecoder(_decode_with(tokenizer), frozenset()),
        )


def _decode_with(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level tokens are written in, and the bytes they mean."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def _byte_level(token: str | None, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes(alphabet[char] for char in token or "")
    except KeyError:  # an added token that is written as it is
        return (token or "").encode()


def _byte_pieces(tokens: list[str | None]) -> list[bytes]:
    alphabet = byte_alphabet()
    return [_byte_level(token, alphabet) for token in tokens]


def _bytes_of(decoder: dict[str, Any] | None) -> Callable[[str], bytes | None]:
    """One token's bytes by the decoder's rules; None where only the decoder itself can tell."""
    if decoder is not None and decoder["type"] == "ByteLevel":
        alphabet = byte_alphabet()
        return lambda token: _byte_level(token, alphabet)
    chain = _byte_fallback_chain(decoder)
    if chain is None:
        return lambda token: None

    def fallback(token: str) -> bytes:
        (piece,) = _fallback_pieces([token], chain)
        return bytes([piece]) if isinstance(piece, int) else str(piece).encode()

    return fallback


def _byte_fallback_chain(decoder: dict[str, Any] | None) -> _Chain | None:
    """None if the decoder does anything that the chain cannot say."""
    if decoder is None or decoder["type"] != "Sequence":
        return None
    steps: list[dict[str, Any]] = list(decoder["decoders"])
    replacements: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        step = steps.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteFallback"], ["ByteFallback", "Fuse"]):
        return _Chain(tuple(replacements))
    if kinds == ["ByteFallback", "Fuse", "Strip"] and steps[2]["stop"] == 0:
        return _Chain(tuple(replacements), steps[2]["content"], steps[2]["start"])
    return None


def _fallback_pieces(tokens: list[str | None], chain: _Chain) -> list[str | int | None]:
    pieces: list[str | int | None] = []
    for token in tokens:
        text = token
        for old, new in chain.replacements if text is not None else ():
            text = str(text).replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(text) if text is not None else None
        pieces.append(int(byte[1], 16) if byte else text)
    return pieces
