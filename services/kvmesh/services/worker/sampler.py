"""The next token from logits: a pure function of (logits, settings, history, seed, position).

Order: repetition penalty, presence and frequency penalties, logit bias, ban of end ids
(`min_tokens`) and of ids that the output's constraint does not allow; log-probabilities are taken
here; then temperature, top_k, top_p, min_p and Gumbel-max. Temperature 0 takes the largest logit,
the lowest id among equals.

The noise of a token id at a position is one fixed number: output `id` of the Philox 4x64 counter
generator with the seed as its key and the position in the second word of its counter. So neither
batching, nor retries, nor truncation by top_k or top_p can change what is drawn.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.services.common.sampling import SamplingSettings

BUCKETS_PER_NAT = 64  # how finely top_p tells logits apart before it sorts
LAST_BUCKET = 64 * 50  # beyond e**-50 of the most likely

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


class TokenHistory:
    """The distinct ids of a sequence and how often each is in its output, for the penalties."""

    def __init__(self, prompt: Iterable[int], output: Iterable[int] = ()) -> None:
        seen = sorted(set(prompt))
        self._place = {token: place for place, token in enumerate(seen)}
        self._size = len(seen)
        self._ids = np.array(seen, np.int64)
        self._counts = np.zeros(self._size, np.float64)
        for token in output:
            self.append(token)

    def append(self, token: int) -> None:
        """Takes note of one output token."""
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = self._size
            if place == len(self._ids):
                self._ids = np.resize(self._ids, 2 * place + 16)
                self._counts = np.resize(self._counts, 2 * place + 16)
            self._ids[place] = token
            self._counts[place] = 0
            self._size += 1
        self._counts[place] += 1

    def penalize(self, row: Floats, settings: SamplingSettings) -> None:
        """Changes `row`, fp64 [vocab], in place."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        values = row[ids]
        rate = settings.repetition_penalty
        values = np.where(values < 0, values * rate, values / rate)
        values -= settings.presence_penalty * (counts > 0) + settings.frequency_penalty * counts
        row[ids] = values


@dataclass(frozen=True, slots=True)
class Choice:
    """What one token depends on besides its logits.

    position: of the token to be chosen in its sequence. history: needed if the settings penalize.
    banned: ids that must not be chosen. allowed: by the output's constraint, bool [vocab];
    None: all.
    """

    settings: SamplingSettings
    position: int
    history: TokenHistory | None = None
    banned: tuple[int, ...] = ()
    allowed: npt.NDArray[np.bool_] | None = None

    @property
    def plain(self) -> bool:
        """Whether the largest logit is the answer and nothing is reported about it."""
        s = self.settings
        free = self.allowed is None and not self.banned
        return free and s.temperature == 0 and not (s.logprobs or s.logit_bias or s.penalizes)


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithms; `top` is (id, logprob), most likely first, lowest id among equals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprob: Logprob | None = None


def sample(logits: npt.NDArray[np.float32], choices: Sequence[Choice]) -> list[Sampled | None]:
    """One token for each row of logits, fp32 [len(choices), vocab].

    None for a row from which nothing can be chosen: a NaN in it, or nothing finite is left.
    """
    best = logits.argmax(axis=1)  # a NaN counts as the largest
    finite = np.isfinite(logits[np.arange(len(best)), best]).tolist()
    tokens: list[int] = best.tolist()
    return [
        None
        if not finite[i]
        else Sampled(tokens[i])
        if choice.plain
        else _sample_row(logits[i], choice)
        for i, choice in enumerate(choices)
    ]


def _sample_row(logits: npt.NDArray[np.float32], choice: Choice) -> Sampled | None:
    settings = choice.settings
    row = logits.astype(np.float64)
    if settings.penalizes and choice.history is not None:
        choice.history.penalize(row, settings)
    for token, bias in settings.logit_bias:
        row[token] += bias
    if choice.banned:
        row[list(choice.banned)] = -np.inf
    if choice.allowed is not None:
        row[~choice.allowed] = -np.inf
    if not math.isfinite(row.max()):
        return None
    token = int(row.argmax()) if settings.temperature == 0 else _draw(row, choice)
    return Sampled(
        token, _logprob(row, token, settings.top_logprobs) if settings.logprobs else None
    )


def _draw(row: Floats, choice: Choice) -> int:
    settings = choice.settings
    scaled = (row - row.max()) / settings.temperature  # the largest is 0, so nothing overflows
    ids = truncate(scaled, settings)
    kept = scaled if ids is None else scaled[ids]
    noise = gumbel(settings.seed or 0, choice.position, len(row), ids)
    place = int((kept + noise).argmax())
    return place if ids is None else int(ids[place])


def truncate(scaled: Floats, settings: SamplingSettings) -> Ids | None:
    """The ids that top_k, top_p and min_p leave, or None for all.

    scaled: logits over temperature, shifted so that the largest is 0.
    """
    ids: Ids | None = None
    if 0 < settings.top_k < len(scaled):
        ids = top_ids(scaled, settings.top_k)
    if settings.top_p < 1:
        ids = _top_p(scaled, ids, settings.top_p)
    if settings.min_p > 0:
        floor = math.log(settings.min_p)
        pool = np.arange(len(scaled)) if ids is None else ids
        ids = pool[scaled[pool] >= floor]
    return ids


def _top_p(scaled: Floats, ids: Ids | None, top_p: float) -> Ids:
    """The fewest most likely ids whose probabilities sum to top_p or more; never none.

    Only the values near the border are sorted: the rest is told apart by counting in buckets.
    """
    values = scaled if ids is None else scaled[ids]
    weights = np.exp(values)
    mass = top_p * float(weights.sum())
    bucket = np.minimum(values * -BUCKETS_PER_NAT, LAST_BUCKET).astype(np.int64)
    reached = np.cumsum(np.bincount(bucket, weights))
    border = min(int(np.searchsorted(reached, mass)), len(reached) - 1)
    at_border = np.flatnonzero(bucket == border)
    at_border = at_border[np.argsort(-values[at_border], kind="stable")]
    above = reached[border - 1] if border else 0.0
    count = int(np.searchsorted(above + np.cumsum(weights[at_border]), mass)) + 1
    kept = np.concatenate((np.flatnonzero(bucket < border), at_border[:count]))
    return kept if ids is None else ids[kept]


def top_ids(row: Floats, count: int) -> Ids:
    """The ids of the `count` largest values, largest first, lowest id among equals."""
    count = min(count, len(row))
    if count < len(row):
        border = np.partition(row, len(row) - count)[len(row) - count]
        above = np.flatnonzero(row > border)
        equal = np.flatnonzero(row == border)[: count - len(above)]
        pool = np.sort(np.concatenate((above, equal)))
    else:
        pool = np.arange(len(row))
    ordered: Ids = pool[np.argsort(-row[pool], kind="stable")]
    return ordered


def gumbel(seed: int, position: int, vocab_size: int, ids: Ids | None = None) -> Floats:
    """Standard Gumbel noise of `ids` (None: of all), fp64."""
    raw = np.random.Philox(key=seed, counter=[0, position, 0, 0]).random_raw(vocab_size)
    if ids is not None:
        raw = raw[ids]
    uniform = ((raw >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1), never at an end
    noise: Floats = -np.log(-np.log(uniform))
    return noise


def _logprob(row: Floats, token: int, top: int) -> Logprob:
    largest = row.max()
    normalizer = largest + math.log(float(np.exp(row - largest).sum()))
    best = top_ids(row, top) if top else np.empty(0, np.int64)
    pairs = zip(best.tolist(), (row[best] - normalizer).tolist(), strict=True)
    return Logprob(token, float(row[token] - normalizer), tuple(pairs))
