"""How answers are scored, each from 0 to 1. Pure.

F1, ROUGE-L, edit similarity and the accuracies follow LongBench (Bai et al., 2308.14508) and the
scripts published with it, so that scores can be compared with published ones; ROUGE-L is that of
Lin 2004 over whole summaries, edit similarity the normalised insert-delete distance.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Words = Callable[[str], list[str]]
Score = Callable[[str], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBERS = re.compile(r"\d+")
_PUNCTUATION = frozenset(string.punctuation)
_CODE_NOISE = ("`", "#", "//")  # lines with one of these are fences or comments, not the answer


def exact_match(reference: str) -> Score:
    """1 if the answer is exactly the reference, but for space around it."""
    return lambda answer: float(answer.strip() == reference)


def contained_share(references: Sequence[str]) -> Score:
    """The share of the references that occur in the answer, in any case: RULER's string match."""

    def score(answer: str) -> float:
        text = answer.lower()
        return sum(reference.lower() in text for reference in references) / len(references)

    return score


def english_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    bare = "".join(char for char in text.lower() if char not in _PUNCTUATION)
    return _ARTICLES.sub(" ", bare).split()


def f1(answer: str, reference: str, words: Words = english_words) -> float:
    """Harmonic mean of precision and recall of the words, as bags."""
    got, wanted = words(answer), words(reference)
    same = (Counter(got) & Counter(wanted)).total()
    return 2 * same / (len(got) + len(wanted)) if same else 0.0


def rouge_l(answer: str, reference: str, words: Words = str.split) -> float:
    """F1 of the words that longest common subsequences of sentences cover.

    Sentences end at full stops. Every sentence of the reference is aligned with every one of the
    answer; counted are the distinct words that any alignment covers, against the distinct words of
    each side.
    """
    got = [words(part) for part in answer.split(".") if part]
    wanted = [words(part) for part in reference.split(".") if part]
    covered = {word for ref in wanted for sentence in got for word in common_words(ref, sentence)}
    distinct = [len({word for sentence in side for word in sentence}) for side in (got, wanted)]
    return 2 * len(covered) / sum(distinct) if covered else 0.0


def common_words(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """A longest common subsequence. Of several, the one that a walk back from both ends meets
    when it gives up a word of `second` on a tie."""
    rows = [[0] * (len(second) + 1)]
    for word in first:
        above, row = rows[-1], [0]
        for index, other in enumerate(second):
            row.append(above[index] + 1 if word == other else max(above[index + 1], row[index]))
        rows.append(row)
    i, j = len(first), len(second)
    found: list[str] = []
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def edit_similarity(answer: str, reference: str) -> float:
    """Of the answer's first line of code, in whole per cent: 1 - (inserts + deletes) / characters.

    That is 2 * longest common subsequence / characters of both.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _CODE_NOISE)), "")
    if not line and not reference:
        return 1.0
    return round(200 * _common_length(line, reference) / (len(line) + len(reference))) / 100


def _common_length(first: str, second: str) -> int:
    """Length of the longest common subsequence, a row of the table in one integer (Hyyro 2004)."""
    where: dict[str, int] = {}
    for index, char in enumerate(first):
        where[char] = where.get(char, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for char in second:
        hits = row & where.get(char, 0)
        row = (row + hits | row - hits) & full
    return len(first) - row.bit_count()


def class_accuracy(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the answer names, if the right one is among them. A name that
    is part of the right one's does not count."""
    named = [name for name in classes if name in answer]
    named = [name for name in named if name == reference or name not in reference]
    return 1 / len(named) if reference in named else 0.0


def number_accuracy(answer: str, wanted: str) -> float:
    """The share of the numbers in the answer that are the one wanted."""
    numbers = _NUMBERS.findall(answer)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def paragraph_accuracy(answer: str, reference: str) -> float:
    """number_accuracy, for a reference that names a paragraph by its number."""
    named = _NUMBERS.search(reference)
    return number_accuracy(answer, named.group()) if named else 0.0
