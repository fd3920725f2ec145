"""Long-context questions of the kinds that RULER asks (Hsieh et al., 2404.06654), generated.

Seven kinds: one needle, one among many keys, several values of one key, several keys, a chain of
variables, common words, frequent words. Documents are made from a seed, as long as asked for, and
scored as RULER scores: the share of the expected strings that the answer holds. Wording and words
are our own, the needles those of `needle`, so figures compare codecs and not published tables.
"""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from kvmesh.integration.evaluate import CountTokens, EvalCase
from kvmesh.integration.metrics import contained_share
from kvmesh.integration.needle import (
    TEMPLATE_RESERVE,
    Fact,
    compose_number,
    compose_word,
    fact_sentence,
    filler_sentence,
    join_prompt,
    make_facts,
    question_for,
    scatter,
)

MIN_TOKENS = 1024  # the lists of words do not fit less
NUM_KEYS, NUM_VALUES, NUM_QUERIES = 8, 4, 4
HOPS = 4  # assignments after a chain's first
NUM_COMMON, NUM_FREQUENT = 10, 3
ZIPF = 2.0  # RULER's exponent for frequent words


@dataclass(frozen=True, slots=True)
class RulerPlan:
    tasks: tuple[str, ...] = ()  # none: all
    lengths: tuple[int, ...] = (1024, 2048)
    cases: int = 50
    seed: int = 30_000


@dataclass(frozen=True, slots=True)
class Question:
    """build: the prompt with so many units of filler, more units never being shorter."""

    build: Callable[[int], str]
    expected: tuple[str, ...]


def ruler_cases(plan: RulerPlan, count: CountTokens) -> list[EvalCase]:
    """Groups are (task, length). Raises ValueError for an unknown task or a length too short."""
    names = plan.tasks or tuple(TASKS)
    for name in names:
        if name not in TASKS:
            raise ValueError(f"no task is named {name!r}; there are {', '.join(TASKS)}")
    return [
        make_ruler_case(name, plan.seed + number, length, count)
        for name in names
        for length in plan.lengths
        for number in range(plan.cases)
    ]


def make_ruler_case(task: str, seed: int, length: int, count: CountTokens) -> EvalCase:
    """One case whose chat prompt is at most, and nearly, `length` tokens long."""
    if length < MIN_TOKENS:
        raise ValueError(f"length is {length}, must be at least {MIN_TOKENS} tokens")
    make, max_tokens = TASKS[task]
    question = make(random.Random(f"ruler/{task}/{seed}/{length}"), length)
    budget = length - TEMPLATE_RESERVE
    units = _most(lambda n: count(question.build(n)) <= budget)
    prompt = question.build(units)
    if count(prompt) > budget:
        raise ValueError(f"task {task} takes {count(prompt)} tokens at least, over {budget}")
    return EvalCase((task, str(length)), prompt, contained_share(question.expected), max_tokens)


def _most(fits: Callable[[int], bool]) -> int:
    """The largest n with fits(n), by doubling and halving; 0 if none fits."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _hidden(rng: random.Random, sentences: list[str], question: str) -> Callable[[int], str]:
    """Sentences at random places of filler, and a question. The filler grows at its end."""
    layout, prose = rng.getrandbits(64), rng.getrandbits(64)

    def build(units: int) -> str:
        words = random.Random(prose)
        filler = [filler_sentence(words) for _ in range(units)]
        return join_prompt(scatter(random.Random(layout), filler, sentences), question)

    return build


def _single(rng: random.Random, length: int) -> Question:
    (fact,) = make_facts(rng, 1)
    build = _hidden(rng, [fact_sentence(rng, fact)], question_for(rng, fact))
    return Question(build, (fact.value,))


def _keys(rng: random.Random, count: int) -> list[Fact]:
    """Facts of one attribute, so that only the name tells them apart."""
    drawn = make_facts(rng, count)
    numbers: list[str] = []
    while len(numbers) < count:
        number = compose_number(rng)
        if not any(number in other or other in number for other in numbers):
            numbers.append(number)
    return [Fact(f.name, "code", number) for f, number in zip(drawn, numbers, strict=True)]


def _multikey(rng: random.Random, length: int) -> Question:
    facts = _keys(rng, NUM_KEYS)
    asked = rng.choice(facts)
    build = _hidden(rng, [fact_sentence(rng, f) for f in facts], question_for(rng, asked))
    return Question(build, (asked.value,))


def _multivalue(rng: random.Random, length: int) -> Question:
    facts = _keys(rng, NUM_VALUES)
    name = facts[0].name
    sentences = [f"One code of {name} is {fact.value}." for fact in facts]
    build = _hidden(rng, sentences, f"What are all {NUM_VALUES} codes of {name}?")
    return Question(build, tuple(fact.value for fact in facts))


def _multiquery(rng: random.Random, length: int) -> Question:
    facts = _keys(rng, NUM_KEYS)
    asked = rng.sample(facts, NUM_QUERIES)
    names = ", ".join(fact.name for fact in asked[:-1]) + f" and {asked[-1].name}"
    sentences = [fact_sentence(rng, fact) for fact in facts]
    build = _hidden(rng, sentences, f"What are the codes of {names}?")
    return Question(build, tuple(fact.value for fact in asked))


def _variables(rng: random.Random, length: int) -> Question:
    """Two chains; asked are all names that end up with the value of the first."""
    names = _distinct(rng, 2 * (HOPS + 1))
    values = _keys(rng, 2)
    sentences: list[str] = []
    for chain in range(2):
        own = names[chain * (HOPS + 1) : (chain + 1) * (HOPS + 1)]
        sentences.append(f"Let {own[0]} be {values[chain].value}.")
        sentences += [f"Let {new} be {old}." for old, new in pairwise(own)]
    places, prose = rng.getrandbits(64), rng.getrandbits(64)
    question = f"Which {HOPS + 1} names have the value {values[0].value}?"

    def build(units: int) -> str:
        words = random.Random(prose)
        filler = [filler_sentence(words) for _ in range(units)]
        draw = random.Random(places)
        # A chain is told in its order: a name is bound before it is used.
        slots = sorted(int(draw.random() * (units + 1)) for _ in sentences)
        order = _interleave(random.Random(places), len(sentences))
        for slot, index in sorted(zip(slots, order, strict=True), reverse=True):
            filler.insert(slot, sentences[index])
        return join_prompt(" ".join(filler), question)

    return Question(build, tuple(names[: HOPS + 1]))


def _interleave(rng: random.Random, count: int) -> list[int]:
    """0..count - 1, two halves shuffled into each other, each in its own order."""
    halves = [list(range(count // 2)), list(range(count // 2, count))]
    order: list[int] = []
    while halves[0] or halves[1]:
        take = rng.random() * (len(halves[0]) + len(halves[1])) >= len(halves[0])
        order.append(halves[take].pop(0))
    return order


def _distinct(rng: random.Random, count: int) -> list[str]:
    words: list[str] = []
    while len(words) < count:
        word = compose_word(rng)
        if word not in words:
            words.append(word)
    return words


def _common(rng: random.Random, length: int) -> Question:
    """A numbered list in which ten words stand ten times as often as the others."""
    often, seldom = (30, 3) if length >= 4096 else (10, 1)
    common = [word.lower() for word in _distinct(rng, NUM_COMMON)]
    seed = rng.getrandbits(64)

    def build(units: int) -> str:
        draw = random.Random(seed)
        others = [compose_word(draw).lower() for _ in range(units)]
        words = common * often + [word for word in others if word not in common] * seldom
        draw.shuffle(words)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
        return join_prompt(listed, f"What are the {NUM_COMMON} most common words in the list?")

    return Question(build, tuple(common))


def _frequent(rng: random.Random, length: int) -> Question:
    """Words whose frequencies fall with the square of their rank, after a mark that leads all."""
    words = ["...", *(word.lower() for word in _distinct(rng, 60))]
    shares = list(accumulate(rank**-ZIPF for rank in range(1, len(words) + 1)))
    seed = rng.getrandbits(64)

    def build(units: int) -> str:
        draw = random.Random(seed)
        drawn = [words[bisect_right(shares, draw.random() * shares[-1])] for _ in range(units)]
        text = _ranked(drawn, words)
        draw.shuffle(text)
        question = f"Apart from the dots, what are the {NUM_FREQUENT} most frequent words?"
        return join_prompt(" ".join(text), question)

    return Question(build, tuple(words[1 : NUM_FREQUENT + 1]))


def _ranked(drawn: list[str], words: list[str]) -> list[str]:
    """As drawn, with words added until the wanted ones really lead, each by two at least."""
    counts = Counter(drawn)
    floor = max((counts[word] for word in words[NUM_FREQUENT + 1 :]), default=0)
    text = list(drawn)
    for rank in range(NUM_FREQUENT, 0, -1):
        missing = max(0, floor + 2 - counts[words[rank]])
        text += [words[rank]] * missing
        floor = counts[words[rank]] + missing
    return text


# The most tokens of an answer are RULER's own.
TASKS: dict[str, tuple[Callable[[random.Random, int], Question], int]] = {
    "single": (_single, 128),
    "multikey": (_multikey, 128),
    "multivalue": (_multivalue, 128),
    "multiquery": (_multiquery, 128),
    "variables": (_variables, 30),
    "common-words": (_common, 120),
    "frequent-words": (_frequent, 50),
}
