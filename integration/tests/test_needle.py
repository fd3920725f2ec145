"""The needle generator: determinism, unambiguous answers, lengths, and separate seeds."""

from __future__ import annotations

import random
import re

import pytest

from kvmesh.integration import needle

CASES = [
    (seed, target, facts) for seed in range(6) for target, facts in ((256, 1), (512, 8), (1024, 4))
]


def count_tokens(text: str) -> int:
    """Counts words, marks and pairs of letters, roughly as a small tokenizer would."""
    return len(re.findall(r"\d{1,2}|[A-Z][a-z]{0,2}|[a-z]{1,6}|[^\w\s]", text))


@pytest.mark.parametrize(("seed", "target", "facts"), CASES)
def test_same_seed_gives_same_case(seed: int, target: int, facts: int) -> None:
    first = needle.make_case(seed, target, facts, count_tokens)
    assert first == needle.make_case(seed, target, facts, count_tokens)
    assert first != needle.make_case(seed + 1, target, facts, count_tokens)


@pytest.mark.parametrize(("seed", "target", "facts"), CASES)
def test_answer_occurs_once_and_name_is_asked(seed: int, target: int, facts: int) -> None:
    case = needle.make_case(seed, target, facts, count_tokens)
    assert case.document.count(case.answer) == 1
    assert case.answer not in case.question
    names = [word for word in re.findall(r"[A-Z][a-z]{6}", case.question) if word in case.document]
    assert len(names) == 1
    assert case.document.count(names[0]) == 1
    sentence = next(part for part in case.document.split(".") if case.answer in part)
    assert names[0] in sentence


@pytest.mark.parametrize(("seed", "target", "facts"), [*CASES, (1, 4096, 8)])
def test_length_target_is_met(seed: int, target: int, facts: int) -> None:
    case = needle.make_case(seed, target, facts, count_tokens)
    length = count_tokens(case.prompt) + needle.TEMPLATE_RESERVE
    assert target - 24 <= length <= target
    assert case.num_facts == facts
    assert case.target_tokens == target


def test_facts_are_distinct() -> None:
    for seed in range(200):
        facts = needle.make_facts(random.Random(seed), needle.MAX_FACTS)
        words = [word for fact in facts for word in (fact.name, fact.value)]
        assert len(words) == len(set(words))
        assert not any(a in b for a in words for b in words if a is not b)


def test_prompt_holds_document_then_question() -> None:
    case = needle.make_case(3, 256, 2, count_tokens)
    assert case.prompt == f"{case.document}\n\n{case.question}"


def test_seeds_are_separate() -> None:
    assert needle.is_training_seed(needle.TRAIN_SEED_BASE)
    assert not needle.is_training_seed(needle.TRAIN_SEED_BASE - 1)
    assert not needle.is_training_seed(0)


@pytest.mark.parametrize(("target", "facts"), [(255, 1), (4097, 1), (256, 0), (256, 9)])
def test_out_of_range_is_refused(target: int, facts: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        needle.make_case(0, target, facts, count_tokens)
