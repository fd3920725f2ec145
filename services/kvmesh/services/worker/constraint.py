"""Which tokens an output constraint still allows. Pure: depends on the output's tokens alone.

The grammar work is llguidance's (Microsoft); what a worker needs of it is the port OutputMatcher.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from kvmesh.services.common.errors import ConfigError, InvalidRequest
from kvmesh.services.common.sampling import OutputConstraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

TOKENIZER_FILE = "tokenizer.json"
MAX_CACHED = 32  # compiled grammars; requests of one service mostly share a few
MAX_ERROR_CHARS = 400
# Between the parts of a JSON text. Allowed more, a model may say blanks until its tokens run out.
WHITESPACE: "JsonCompileOptions" = {"whitespace_pattern": " ?"}
# About 20 ms of compilation and 15 ms of one mask at most, by llguidance's own figures for its
# fuel: a constraint can fail for being too complex, and never hold up the steps of others for long.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class OutputMatcher(Protocol):
    """A constraint, and how far the output has come in it."""

    @property
    def done(self) -> bool:
        """Nothing may follow: the output is complete."""
        ...

    @property
    def error(self) -> str:
        """Why it cannot go on; empty if it can."""
        ...

    def allowed(self) -> npt.NDArray[np.bool_]:
        """For each id, whether it may come next, bool [vocab]; none after an error."""
        ...

    def advance(self, token: int) -> None:
        """Takes the next token of the output."""
        ...


class GrammarMatcher:
    """A compiled grammar that follows one output. An end id is allowed where the output is whole.

    matcher: its own copy. vocab_size: ids are below it.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def done(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str:
        return _brief(self._matcher.get_error())

    def allowed(self) -> npt.NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, np.bool_)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return mask.view(np.bool_)

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)


class Grammars:
    """Compiles constraints for one tokenizer. Its methods may be called from several threads.

    tokenizer: the text of a tokenizer.json. vocab_size: the model's. eos_token_ids: what ends an
    output; none: the tokenizer's own. Raises ValueError if llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        ends = list(eos_token_ids) or None
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends)
        self._compiled: OrderedDict[OutputConstraint, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def open(self, constraint: OutputConstraint, output: Sequence[int] = ()) -> GrammarMatcher:
        """A matcher that has followed `output`. Takes milliseconds.

        Raises InvalidRequest naming what is wrong with the constraint.
        """
        matcher = self._compile(constraint).deep_copy()
        if output and not matcher.consume_tokens(list(output)):
            raise InvalidRequest(
                f"the {len(output)} output tokens so far do not match constraint.{constraint.kind}"
            )
        return GrammarMatcher(matcher, self._vocab_size)

    def _compile(self, constraint: OutputConstraint) -> LLMatcher:
        with self._lock:
            known = self._compiled.get(constraint)
            if known is not None:
                self._compiled.move_to_end(constraint)
                return known
        matcher = LLMatcher(self._tokenizer, _grammar(constraint), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidRequest(
                f"constraint.{constraint.kind} is not usable: {_brief(matcher.get_error())}"
            )
        with self._lock:
            self._compiled[constraint] = matcher
            if len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return matcher


def open_grammars(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Grammars:
    """For the tokenizer of a checkpoint folder. Raises ConfigError naming what is wrong with it."""
    file = folder / TOKENIZER_FILE
    try:
        return Grammars(file.read_text(), vocab_size, eos_token_ids)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} gives no vocabulary for constraints: {error}") from error


def _grammar(constraint: OutputConstraint) -> str:
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    try:
        return LLMatcher.grammar_from_json_schema(constraint.text, overrides=WHITESPACE)
    except ValueError as error:
        raise InvalidRequest(f"constraint.json_schema is not a JSON object: {error}") from error


def _brief(message: str) -> str:
    """The first part of one of llguidance's messages, which may be pages long."""
    text = " ".join(message.split())
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]} ..."
