"""One sequence's ids to its text: whole characters, nothing twice, ended by stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvmesh.services.tokenizer.pieces import IncrementalDecoder


class Emission(NamedTuple):
    """New text of one sequence.

    stopped: a stop string was met; no text follows.
    num_tokens: ids consumed from the sequence's start; when stopped, up to and with the one that
        completed the stop string.
    """

    text: str
    stopped: bool
    num_tokens: int


@dataclass(slots=True)
class _Pattern:
    """A stop string with its Knuth-Morris-Pratt table, and how much of it the text ends with."""

    text: str
    borders: list[int]
    matched: int = 0

    def advance(self, char: str) -> bool:
        while self.matched and self.text[self.matched] != char:
            self.matched = self.borders[self.matched - 1]
        if self.text[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.text)


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for char in text[1:]:
        length = borders[-1]
        while length and text[length] != char:
            length = borders[length - 1]
        borders.append(length + 1 if text[length] == char else 0)
    return borders


class StopMatcher:
    """Finds the stop string that is complete first; of those that end together, the longest.

    So the answer does not depend on how the text was cut into parts. Text that may yet become
    part of a stop string is held back.
    """

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._patterns = [_Pattern(text, _borders(text)) for text in dict.fromkeys(stop) if text]
        # The longest first, for the check of a tail.
        self._stop = sorted((p.text for p in self._patterns), key=len, reverse=True)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can go out, and whether a stop string was met."""
        for i, char in enumerate(text):
            lengths = [len(p.text) for p in self._patterns if p.advance(char)]
            if lengths:
                return self._upto(self._held + text[: i + 1], max(lengths)), True
        buffer = self._held + text
        cut = len(buffer) - max(p.matched for p in self._patterns)
        self._held = buffer[cut:]
        return buffer[:cut], False

    def ends_with(self, tail: str) -> str | None:
        """The text that goes out if `tail`, which is not yet certain, completes a stop string."""
        recent = (self._held + tail[-len(self._stop[0]) :])[-len(self._stop[0]) :]
        for stop in self._stop:
            if recent.endswith(stop):
                return self._upto(self._held + tail, len(stop))
        return None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _upto(self, text: str, stop_length: int) -> str:
        return text if self._include else text[: len(text) - stop_length]


class Detokenizer:
    """Streams one sequence. Feed it ids; `end` flushes what was held back."""

    def __init__(
        self, decoder: IncrementalDecoder, stop: Sequence[str] = (), include_stop: bool = False
    ) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stop, include_stop) if any(stop) else None
        self._num_tokens = 0

    def feed(self, token_ids: Sequence[int], end: bool = False) -> Emission:
        """The text that these ids make certain. Not to be called after it stopped or ended."""
        if self._matcher is None:
            self._num_tokens += len(token_ids)
            text = "".join(map(self._decoder.feed, token_ids))
            return Emission(text + self._decoder.flush() if end else text, False, self._num_tokens)
        return self._feed_matched(self._matcher, token_ids, end)

    def _feed_matched(self, matcher: StopMatcher, token_ids: Sequence[int], end: bool) -> Emission:
        parts: list[str] = []
        for token_id in token_ids:
            self._num_tokens += 1
            text, stopped = matcher.push(self._decoder.feed(token_id))
            parts.append(text)
            if not stopped and (tail := self._decoder.tail()):
                last = matcher.ends_with(tail)
                stopped = last is not None
                parts.append(last or "")
            if stopped:
                return Emission("".join(parts), True, self._num_tokens)
        if not end:
            return Emission("".join(parts), False, self._num_tokens)
        text, stopped = matcher.push(self._decoder.flush())
        parts += [text, "" if stopped else matcher.flush()]
        return Emission("".join(parts), stopped, self._num_tokens)
