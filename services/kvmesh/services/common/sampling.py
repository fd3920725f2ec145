"""Sampling parameters, checked once into an immutable form; routers and workers use the same check.

Pure: no RPC, no clock.
"""

import math
from dataclasses import dataclass
from typing import Literal

from kvmesh.services.common.errors import InvalidRequest
from kvmesh.v1 import common_pb2

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0  # of presence and frequency, either sign
MAX_CONSTRAINT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class OutputConstraint:
    """What the whole output must match: the text of a JSON Schema, or a regular expression."""

    kind: Literal["json_schema", "regex"]
    text: str


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the next token is chosen; the meaning of each field is kvmesh.v1.SamplingParams'.

    logit_bias: (token id, added to its logit), by rising id. seed, max_tokens: None if not set.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    min_tokens: int = 0
    include_stop: bool = False
    keep_special_tokens: bool = False
    constraint: OutputConstraint | None = None

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on the tokens before it, beyond the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def check_sampling(params: common_pb2.SamplingParams, vocab_size: int) -> SamplingSettings:
    """The settings that `params` stand for.

    Raises InvalidRequest naming the field, its value and its limit.
    """
    settings = SamplingSettings(
        temperature=params.temperature,  # absent: 0
        top_k=params.top_k,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        min_p=params.min_p,
        repetition_penalty=(
            params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
        ),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple(sorted(params.logit_bias.items())),
        seed=params.seed if params.HasField("seed") else None,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        stop_token_ids=frozenset(params.stop_token_ids),
        stop=tuple(params.stop),
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        top_logprobs=params.top_logprobs,
        min_tokens=params.min_tokens,
        include_stop=params.include_stop,
        keep_special_tokens=params.keep_special_tokens,
        constraint=_constraint(params),
    )
    _check_ranges(settings)
    _check_lengths(settings)
    _check_ids(settings, vocab_size)
    return settings


def _constraint(params: common_pb2.SamplingParams) -> OutputConstraint | None:
    if not params.HasField("constraint"):
        return None
    kind = params.constraint.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("the constraint is empty; set one of json_schema, regex")
    text = params.constraint.json_schema if kind == "json_schema" else params.constraint.regex
    size = len(text.encode())
    if not 0 < size <= MAX_CONSTRAINT_BYTES:
        raise InvalidRequest(
            f"constraint.{kind} has {size} bytes, must have 1..{MAX_CONSTRAINT_BYTES}"
        )
    return OutputConstraint(kind, text)


def _check_ranges(settings: SamplingSettings) -> None:
    # Written so that a NaN, which compares false with everything, is refused as well.
    penalty = f"in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}]"
    bounds: tuple[tuple[str, bool, str], ...] = (
        ("temperature", 0 <= settings.temperature < math.inf, "finite and >= 0"),
        ("top_p", 0 < settings.top_p <= 1, "in (0, 1]"),
        ("min_p", 0 <= settings.min_p <= 1, "in [0, 1]"),
        ("repetition_penalty", 0 < settings.repetition_penalty < math.inf, "finite and > 0"),
        ("presence_penalty", abs(settings.presence_penalty) <= MAX_PENALTY, penalty),
        ("frequency_penalty", abs(settings.frequency_penalty) <= MAX_PENALTY, penalty),
    )
    for name, inside, limit in bounds:
        if not inside:
            raise InvalidRequest(f"{name} is {getattr(settings, name):g}, must be {limit}")


def _check_lengths(settings: SamplingSettings) -> None:
    if settings.max_tokens == 0:
        raise InvalidRequest("max_tokens is 0, must be > 0")
    if settings.max_tokens is not None and settings.min_tokens > settings.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {settings.min_tokens}, must be at most max_tokens, "
            f"{settings.max_tokens}"
        )
    if settings.top_logprobs > MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs is {settings.top_logprobs}, must be at most {MAX_TOP_LOGPROBS}"
        )
    if settings.top_logprobs and not settings.logprobs:
        raise InvalidRequest(f"top_logprobs is {settings.top_logprobs}, but logprobs is false")
    if len(settings.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"{len(settings.stop)} stop strings, must be at most {MAX_STOP_STRINGS}"
        )
    for text in settings.stop:
        size = len(text.encode())
        if not 0 < size <= MAX_STOP_BYTES:
            raise InvalidRequest(f"a stop string has {size} bytes, must have 1..{MAX_STOP_BYTES}")


def _check_ids(settings: SamplingSettings, vocab_size: int) -> None:
    for token_id in settings.stop_token_ids:
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"stop token id {token_id} is outside the vocabulary of {vocab_size}"
            )
    for token_id, bias in settings.logit_bias:
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"logit_bias token id {token_id} is outside the vocabulary of {vocab_size}"
            )
        if not abs(bias) <= MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias of token id {token_id} is {bias:g}, "
                f"must be in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]"
            )
