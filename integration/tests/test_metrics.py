"""Scores of answers, against what the programs that LongBench uses make of the same texts."""

import pytest

from kvmesh.integration import metrics

# F of ROUGE-L by the package rouge 1.0.1.
ROUGE = [
    (
        "The harbour had been quiet since noon. Two boats lay against the long wall.",
        "It was quiet in the harbour. Two boats lay along the wall and gulls walked about.",
        0.413793,
    ),
    ("a b c d e f g", "g f e d c b a", 0.142857),
    (
        "the cat sat. the cat ran. the dog sat",
        "the dog ran. the cat sat on the mat",
        0.833333,
    ),
    ("one two three", "four five six", 0.0),
    ("Same text here.", "Same text here.", 1.0),
    ("x y x y z x. y z", "x y x z y. x x z y z", 1.0),
]
# fuzz.ratio of RapidFuzz 3.14, in whole per cent.
EDITS = [
    ("return best", "return (best, start)", 0.71),
    ("for i in range(10):", "for index in range(len(values)):", 0.67),
    ("abc", "xyz", 0.0),
    ("x = 1", "x = 1", 1.0),
]


@pytest.mark.parametrize(("answer", "reference", "expected"), ROUGE)
def test_rouge_l_is_that_of_the_benchmark(answer: str, reference: str, expected: float) -> None:
    assert metrics.rouge_l(answer, reference) == pytest.approx(expected, abs=2e-6)


def test_rouge_l_of_nothing_is_nothing() -> None:
    assert metrics.rouge_l("", "a b") == metrics.rouge_l("...", "a b") == 0


@pytest.mark.parametrize(("answer", "reference", "expected"), EDITS)
def test_edit_similarity_is_that_of_the_benchmark(
    answer: str, reference: str, expected: float
) -> None:
    assert metrics.edit_similarity(answer, reference) == expected
    assert metrics.edit_similarity(reference, answer) == expected


def test_edit_similarity_takes_the_first_line_that_is_code() -> None:
    answer = "\n```python\n# a comment\n// another\nreturn best\nreturn worst"
    assert metrics.edit_similarity(answer, "return best") == 1
    assert metrics.edit_similarity("# only a comment", "return best") == 0
    assert metrics.edit_similarity("", "") == 1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("a red house", "the red house by the lake", 2 * 2 / (2 + 4)),
        ("red red red", "red", 2 * 1 / (3 + 1)),  # as bags: a word counts once for each time
        ("blue", "red", 0.0),
        ("", "red", 0.0),
    ],
)
def test_f1(answer: str, reference: str, expected: float) -> None:
    assert metrics.f1(answer, reference) == pytest.approx(expected)


def test_f1_of_a_language_without_spaces() -> None:
    assert metrics.f1("北京", "北京市", list) == pytest.approx(2 * 2 / 5)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Food", 1.0),
        ("Food or Sport", 0.5),
        ("Sport", 0.0),
        ("Other food", 0.0),  # in this letter case only "Other" is named
        ("", 0.0),
    ],
)
def test_class_accuracy(answer: str, expected: float) -> None:
    assert metrics.class_accuracy(answer, "Food", ("Food", "Sport", "Other")) == expected


def test_a_class_within_the_right_one_does_not_count() -> None:
    classes = ("Group", "Group or organization", "Person")
    assert metrics.class_accuracy("Group or organization", "Group or organization", classes) == 1
    assert metrics.class_accuracy("Group", "Group or organization", classes) == 0


def test_numbers() -> None:
    assert metrics.number_accuracy("There are 7, or 8.", "7") == 0.5
    assert metrics.number_accuracy("17", "7") == metrics.number_accuracy("none", "7") == 0
    assert metrics.paragraph_accuracy("Paragraph 12", "Paragraph 12") == 1
    assert metrics.paragraph_accuracy("It is 12 or 3, not 4", "Paragraph 12") == 1 / 3


def test_contained_share() -> None:
    score = metrics.contained_share(("4711", "Mirado"))
    assert score("mirado has the code 4711") == 1
    assert score("It is 4711.") == 0.5
    assert score("no") == 0


def test_exact_match() -> None:
    score = metrics.exact_match("4711")
    assert score(" 4711\n") == 1 and score("4711.") == 0
