"""Generated questions: from the seed alone, as long as asked for, and with the answer in them."""

import re
from collections import Counter

import pytest

from kvmesh.integration.ruler import TASKS, RulerPlan, make_ruler_case, ruler_cases

LENGTHS = (1024, 1500, 4096)


def count(text: str) -> int:
    return len(re.findall(r"\w{1,3}|[^\w\s]", text))


def document(prompt: str) -> str:
    return prompt.rsplit("\n\n", 1)[0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_a_case_is_made_by_its_seed_and_fills_its_length(task: str, length: int) -> None:
    case = make_ruler_case(task, 5, length, count)
    assert case.prompt == make_ruler_case(task, 5, length, count).prompt
    assert case.prompt != make_ruler_case(task, 6, length, count).prompt
    assert length - 48 <= count(case.prompt) <= length
    assert case.group == (task, str(length))
    assert case.score("") == 0


@pytest.mark.parametrize("task", TASKS)
def test_the_document_holds_the_answer_and_the_question_does_not(task: str) -> None:
    for seed in range(10):
        case = make_ruler_case(task, seed, 1024, count)
        assert case.score(document(case.prompt)) == 1, seed
        assert case.score(case.prompt.rsplit("\n\n", 1)[1]) == 0, seed


@pytest.mark.parametrize(
    ("task", "pattern", "number"), [("multivalue", r"\d{4,}", 4), ("multiquery", r"\d{4,}", 8)]
)
def test_several_values_are_hidden(task: str, pattern: str, number: int) -> None:
    case = make_ruler_case(task, 1, 1024, count)
    values = re.findall(pattern, document(case.prompt))
    assert len(values) == len(set(values)) == number
    assert case.score(" ".join(values)) == 1
    assert sum(case.score(value) for value in values) == pytest.approx(1)


def test_following_the_variables_gives_the_answer() -> None:
    for seed in range(30):
        case = make_ruler_case("variables", seed, 1024, count)
        bound: dict[str, str] = {}
        for name, value in re.findall(r"Let (\w+) be (\w+)\.", case.prompt):
            bound[name] = bound.get(value, value)
            assert bound[name].isdigit(), f"seed {seed}: {value} is used before it is bound"
        asked = re.findall(r"value (\d+)\?", case.prompt)[0]
        held = [name for name, value in bound.items() if value == asked]
        assert len(bound) == 10 and len(held) == 5
        assert case.score(" ".join(held)) == 1
        assert case.score(" ".join(set(bound) - set(held))) == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_counting_the_words_gives_the_answer(length: int) -> None:
    for seed in range(10):
        case = make_ruler_case("common-words", seed, length, count)
        words = Counter(re.findall(r"\d+\. (\w+)", case.prompt)).most_common()
        assert case.score(" ".join(word for word, _ in words[:10])) == 1
        assert words[9][1] >= 2 * words[10][1]
        case = make_ruler_case("frequent-words", seed, length, count)
        words = Counter(document(case.prompt).split()).most_common()
        assert words[0][0] == "..."
        assert case.score(" ".join(word for word, _ in words[1:4])) == 1
        assert words[3][1] > words[4][1]


def test_a_plan_makes_every_task_at_every_length() -> None:
    cases = ruler_cases(RulerPlan(lengths=(1024, 1500), cases=2), count)
    assert len(cases) == len(TASKS) * 2 * 2
    assert len({case.prompt for case in cases}) == len(cases)
    with pytest.raises(ValueError, match="no task is named 'x'; there are single"):
        ruler_cases(RulerPlan(("x",)), count)
    with pytest.raises(ValueError, match="at least 1024"):
        make_ruler_case("single", 0, 256, count)
    with pytest.raises(ValueError, match="tokens at least, over"):
        make_ruler_case("common-words", 0, 1024, lambda text: 10 * len(text))
