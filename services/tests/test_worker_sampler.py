"""The sampler against softmax and Hugging Face's logits processors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvmesh.services.common.errors import InvalidRequest
from kvmesh.services.common.sampling import SamplingSettings, check_sampling
from kvmesh.services.worker.sampler import (
    Choice,
    Sampled,
    TokenHistory,
    gumbel,
    sample,
    top_ids,
    truncate,
)
from kvmesh.v1 import common_pb2

VOCAB = 40
# 39 degrees of freedom: a right sampler exceeds this with probability 1e-6 per test.
CHI_SQUARE_LIMIT = 100.0


def logits_of(seed: int, vocab: int = VOCAB) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 1.5, vocab).astype(np.float32)


def one(logits: Any, history: TokenHistory | None = None, position: int = 0, **s: Any) -> Sampled:
    banned = s.pop("banned", ())
    (found,) = sample(logits[None], [Choice(SamplingSettings(**s), position, history, banned)])
    assert found is not None
    return found


def draws(logits: Any, count: int, **settings: Any) -> np.ndarray[Any, Any]:
    tokens = [one(logits, position=p, **settings).token for p in range(count)]
    return np.bincount(tokens, minlength=len(logits))


def softmax(row: Any) -> Any:
    shifted = np.exp(np.asarray(row, np.float64) - np.max(row))
    return shifted / shifted.sum()


def warped(logits: Any, *warpers: Any) -> Any:
    """What Hugging Face's warpers leave of the logits, as probabilities."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for warper in warpers:
        scores = warper(torch.zeros((1, 1), dtype=torch.long), scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"temperature": 1.3, "top_k": 7}, [TemperatureLogitsWarper(1.3), TopKLogitsWarper(7)]),
        ({"temperature": 1.3, "top_p": 0.7}, [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.7)]),
        ({"temperature": 1.5, "min_p": 0.2}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
            [
                TemperatureLogitsWarper(1.5),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.1),
            ],
        ),
    ],
)
def test_draws_follow_the_distribution(settings: dict[str, Any], warpers: list[Any]) -> None:
    logits, count = logits_of(1), 6000
    expected = warped(logits, *warpers) * count
    found = draws(logits, count, seed=11, **settings)
    assert not found[expected == 0].any()
    kept = expected > 0
    chi_square = float(((found - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < CHI_SQUARE_LIMIT, (settings, chi_square)


def test_seeds_and_positions_are_independent_draws() -> None:
    """Pairs of consecutive positions, and of two seeds, fill the whole square."""
    row = np.zeros(6, np.float32)
    for other_seed, shift in ((3, 1), (4, 0)):
        pairs = np.zeros((6, 6))
        for p in range(5000):
            a = one(row, position=p, temperature=1.0, seed=3).token
            b = one(row, position=p + shift, temperature=1.0, seed=other_seed).token
            pairs[a, b] += 1
        expected = 5000 / 36
        assert ((pairs - expected) ** 2 / expected).sum() < 90  # 35 degrees of freedom


def test_noise_is_standard_gumbel_and_the_same_for_any_subset() -> None:
    noise = gumbel(2**64 - 1, 123_456, 50_000)
    assert abs(noise.mean() - 0.5772) < 0.02  # its mean, and 3.5 standard errors
    assert abs(noise.std() - math.pi / math.sqrt(6)) < 0.02
    ids = np.array([49_999, 0, 77])
    assert (gumbel(2**64 - 1, 123_456, 50_000, ids) == noise[ids]).all()
    assert not (gumbel(2**64 - 1, 123_457, 50_000) == noise).any()


def test_a_token_depends_on_its_own_row_alone() -> None:
    rows = np.stack([logits_of(seed) for seed in range(8)])
    choices = [
        Choice(SamplingSettings(temperature=i % 3 * 0.5, seed=i, top_p=0.9, logprobs=True), 50 + i)
        for i in range(8)
    ]
    together = sample(rows, choices)
    alone = [sample(rows[i : i + 1], [choices[i]])[0] for i in range(8)]
    assert together == alone
    assert sample(rows[::-1], choices[::-1]) == together[::-1]


def test_repetition_penalty_is_hugging_faces() -> None:
    logits, prompt, output = logits_of(5), [3, 9, 9, 20], [20, 31, 3]
    history = TokenHistory(prompt, output)
    found = one(logits, history, repetition_penalty=1.7, logprobs=True, top_logprobs=VOCAB)
    ids = torch.tensor([prompt + output])
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    scores = processor(ids, torch.from_numpy(logits.astype(np.float64))[None])
    expected = torch.log_softmax(scores, -1)[0].numpy()
    assert found.token == int(expected.argmax())
    assert found.logprob is not None
    assert len(found.logprob.top) == VOCAB
    for token, value in found.logprob.top:
        assert value == pytest.approx(expected[token], abs=1e-9)


def test_presence_and_frequency_count_output_only() -> None:
    logits, prompt, output = logits_of(6), [1, 2, 3], [2, 30, 30, 2, 2]
    history = TokenHistory(prompt)
    for token in output:
        history.append(token)
    settings = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": ((8, 1.5),)}
    found = one(logits, history, **settings, logprobs=True, top_logprobs=VOCAB)
    expected = logits.astype(np.float64)
    for token in range(VOCAB):
        count = output.count(token)
        expected[token] -= 0.3 * count + 0.7 * (count > 0) - 1.5 * (token == 8)
    expected = np.log(softmax(expected))
    assert found.logprob is not None
    assert dict(found.logprob.top) == pytest.approx(dict(enumerate(expected)), abs=1e-9)


def test_history_grows_as_if_it_were_made_at_once() -> None:
    rng = np.random.default_rng(8)
    output = rng.integers(0, 500, 400).tolist()
    grown = TokenHistory([1, 2, 3])
    for token in output:
        grown.append(token)
    settings = SamplingSettings(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1)
    rows = [logits_of(9, 500).astype(np.float64) for _ in range(2)]
    grown.penalize(rows[0], settings)
    TokenHistory([1, 2, 3], output).penalize(rows[1], settings)
    assert (rows[0] == rows[1]).all()


def test_greedy_takes_the_lowest_of_equals() -> None:
    row = np.array([1, 5, 5, 2], np.float32)
    assert one(row).token == 1
    assert one(row, banned=(1,)).token == 2
    assert one(row, logprobs=True).token == 1


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-6, 1),
        (0.499, 1),
        (0.501, 2),
        (0.749, 2),
        (0.751, 3),
        (0.874, 3),
        (0.876, 4),
        (1.0, 4),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    logits = np.log(np.array([0.125, 0.5, 0.25, 0.125])).astype(np.float32)
    counts = draws(logits, 400, temperature=1.0, top_p=top_p, seed=1)
    assert set(np.flatnonzero(counts)) == set([1, 2, 0, 3][:kept])


def test_top_p_cuts_equals_by_id() -> None:
    flat = np.zeros(1000, np.float32)
    flat[7] = 0.5
    counts = draws(flat, 3000, temperature=1.0, top_p=0.9, seed=5)
    assert len(np.flatnonzero(counts)) > 700
    assert not counts[905:].any()  # of equals, the lowest ids are kept


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0, 200.0])
def test_top_p_is_that_of_a_full_sort(top_p: float, spread: float) -> None:
    scaled = np.random.default_rng(4).normal(0, spread, 3000)
    scaled -= scaled.max()
    order = np.argsort(-scaled, kind="stable")
    cumulated = np.cumsum(np.exp(scaled[order]))
    count = int((cumulated < top_p * cumulated[-1]).sum()) + 1
    settings = SamplingSettings(temperature=1.0, top_p=top_p)
    assert sorted(_kept(scaled, settings)) == sorted(order[:count].tolist())


def _kept(scaled: Any, settings: SamplingSettings) -> list[int]:
    ids = truncate(scaled, settings)
    return list(range(len(scaled))) if ids is None else ids.tolist()


def test_top_ids_breaks_ties_by_id() -> None:
    row = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    for count in range(1, 7):
        assert top_ids(row, count).tolist() == [1, 3, 2, 4, 5, 0][:count]


def test_extremes_stay_finite() -> None:
    row = np.array([1e30, -1e30, 3e38, 0], np.float32)
    assert one(row, temperature=1e-45, seed=1).token == 2
    assert one(row, temperature=3e38, seed=1).token in range(4)
    assert one(row, logprobs=True, top_logprobs=4).logprob is not None


def test_rows_without_a_finite_best_choose_nothing() -> None:
    rows = np.zeros((4, 5), np.float32)
    rows[0, 2] = np.nan
    rows[1, 3] = np.inf
    rows[2] = -np.inf
    settings = SamplingSettings(temperature=1.0, seed=1)
    found = sample(rows, [Choice(settings, 0)] * 3 + [Choice(settings, 0, None, tuple(range(5)))])
    assert found == [None] * 4


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"temperature": -1}, "temperature is -1, must be finite and >= 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0}, r"top_p is 0, must be in \(0, 1\]"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": 2.5}, r"presence_penalty is 2.5, must be in \[-2, 2\]"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4, must be at most max_tokens, 3"),
        ({"logit_bias": {VOCAB: 1.0}}, "token id 40 is outside the vocabulary of 40"),
        ({"logit_bias": {1: 101.0}}, "logit_bias of token id 1 is 101"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token id 1 is nan"),
        ({"stop_token_ids": [VOCAB]}, "stop token id 40 is outside the vocabulary of 40"),
        ({"stop": ["x"] * 17}, "17 stop strings, must be at most 16"),
        ({"stop": [""]}, "a stop string has 0 bytes"),
        ({"stop": ["é" * 129]}, "a stop string has 258 bytes"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        ({"top_logprobs": 1}, "logprobs is false"),
    ],
)
def test_wrong_parameters_are_named(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        check_sampling(common_pb2.SamplingParams(**params), VOCAB)


def test_defaults_are_greedy_and_unlimited() -> None:
    assert check_sampling(common_pb2.SamplingParams(), VOCAB) == SamplingSettings()
