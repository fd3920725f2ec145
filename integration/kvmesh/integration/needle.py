"""Documents with facts hidden in filler prose, and questions about them.

The generator is shared: training draws seeds from `TRAIN_SEED_BASE` upwards, evaluation draws
them from below it, so no evaluation document is ever seen in training. Names and values are
composed afresh from syllables and digits, and each is spelled by several tokens, so an answer
can only come from reading the document.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

TRAIN_SEED_BASE = 1 << 40
MIN_TOKENS = 256
MAX_TOKENS = 4096
MAX_FACTS = 8
UNKNOWN_ANSWER = "I do not know."
# The chat template adds a few control tokens around the user message.
TEMPLATE_RESERVE = 8

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
OPEN_SYLLABLES = tuple(c + v for c in _CONSONANTS for v in _VOWELS)
HEADS = tuple(
    (c + v + "lnrs"[(i + j) % 4]).capitalize()
    for i, c in enumerate(_CONSONANTS)
    for j, v in enumerate(_VOWELS)
)

NUMBER_ATTRIBUTES = ("code", "number", "key", "price", "weight", "age")
WORD_ATTRIBUTES = ("friend", "town", "ship", "horse", "password", "teacher")

FACT_FORMS = (
    "The {attribute} of {name} is {value}.",
    "Note that the {attribute} of {name} is {value}.",
    "{name} has the {attribute} {value}.",
    "For {name} the {attribute} is {value}.",
    "We know that the {attribute} of {name} is {value}.",
)
QUESTION_FORMS = (
    "What is the {attribute} of {name}?",
    "Tell me the {attribute} of {name}.",
    "Which {attribute} does {name} have?",
    "What {attribute} does the text give for {name}?",
    "Please find the {attribute} of {name}.",
)

_ADJECTIVES = (
    "old", "small", "green", "quiet", "bright", "cold", "warm", "long", "red", "kind", "young",
    "heavy", "white", "soft", "tall", "dark",
)  # fmt: skip
_ANIMATE = (
    "farmer", "dog", "bird", "child", "baker", "woman", "man", "fox", "sailor", "cat", "king",
    "painter", "doctor", "girl", "boy", "cow",
)  # fmt: skip
_PLACES = (
    "river", "house", "garden", "hill", "road", "forest", "market", "bridge", "lake", "field",
    "tower", "wall", "gate", "beach", "mill", "barn",
)  # fmt: skip
_THINGS = (
    "bread", "stone", "book", "lamp", "apple", "basket", "chair", "letter", "coat", "bell", "rope",
    "cup", "map", "boat", "flower", "box",
)  # fmt: skip
_MOTIONS = ("walks", "sits", "sleeps", "waits", "stands", "runs", "rests", "sings")
_ACTIONS = ("carries", "finds", "sees", "keeps", "paints", "holds", "likes", "brings")
_PREPOSITIONS = ("near", "behind", "by", "under", "across", "beside")
_TIMES = ("morning", "evening", "night", "summer", "winter", "spring")

FILLER_WORDS = (
    _ADJECTIVES + _ANIMATE + _PLACES + _THINGS + _MOTIONS + _ACTIONS + _PREPOSITIONS + _TIMES
)


@dataclass(frozen=True)
class Fact:
    """One statement: the `attribute` of `name` is `value`."""

    name: str
    attribute: str
    value: str


@dataclass(frozen=True)
class NeedleCase:
    """One document, one question about it, and the only right answer."""

    document: str
    question: str
    answer: str
    num_facts: int
    target_tokens: int

    @property
    def prompt(self) -> str:
        """The user message: the document, then the question."""
        return join_prompt(self.document, self.question)


def join_prompt(document: str, question: str) -> str:
    """Puts a document and a question into one user message."""
    return f"{document}\n\n{question}"


def is_training_seed(seed: int) -> bool:
    """Tells whether a seed belongs to training; evaluation must use the other seeds."""
    return seed >= TRAIN_SEED_BASE


def compose_word(rng: random.Random) -> str:
    """Composes a fresh capitalised word of three syllables."""
    return rng.choice(HEADS) + rng.choice(OPEN_SYLLABLES) + rng.choice(OPEN_SYLLABLES)


def compose_number(rng: random.Random) -> str:
    """Composes a fresh number of four to six digits."""
    digits = rng.randint(4, 6)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _fresh(rng: random.Random, make: Callable[[random.Random], str], used: list[str]) -> str:
    """Draws until the word neither begins like a used one nor contains or repeats it."""
    while True:
        word = make(rng)
        if all(word[:3] != other[:3] and word not in other and other not in word for other in used):
            used.append(word)
            return word


def make_facts(rng: random.Random, count: int) -> list[Fact]:
    """Draws facts whose names and values are all distinct."""
    used: list[str] = []
    facts: list[Fact] = []
    for _ in range(count):
        name = _fresh(rng, compose_word, used)
        if rng.random() < 0.6:
            attribute, value = rng.choice(NUMBER_ATTRIBUTES), _fresh(rng, compose_number, used)
        else:
            attribute, value = rng.choice(WORD_ATTRIBUTES), _fresh(rng, compose_word, used)
        facts.append(Fact(name, attribute, value))
    return facts


def fact_sentence(rng: random.Random, fact: Fact) -> str:
    """States a fact in one of several wordings."""
    return rng.choice(FACT_FORMS).format(name=fact.name, attribute=fact.attribute, value=fact.value)


def question_for(rng: random.Random, fact: Fact) -> str:
    """Asks for a fact's value in one of several wordings."""
    return rng.choice(QUESTION_FORMS).format(name=fact.name, attribute=fact.attribute)


def filler_sentence(rng: random.Random) -> str:
    """Writes one sentence of prose that states nothing about any name."""
    who = f"{rng.choice(_ADJECTIVES)} {rng.choice(_ANIMATE)}"
    place = f"{rng.choice(_PREPOSITIONS)} the {rng.choice(_PLACES)}"
    form = rng.randrange(4)
    if form == 0:
        return f"The {who} {rng.choice(_MOTIONS)} {place}."
    if form == 1:
        return f"The {who} {rng.choice(_ACTIONS)} the {rng.choice(_THINGS)} {place}."
    if form == 2:
        return f"In the {rng.choice(_TIMES)} the {who} {rng.choice(_MOTIONS)} {place}."
    thing = f"{rng.choice(_ADJECTIVES)} {rng.choice(_THINGS)}"
    return f"Every {rng.choice(_TIMES)} a {who} {rng.choice(_ACTIONS)} the {thing}."


def scatter(rng: random.Random, filler: list[str], facts: list[str]) -> str:
    """Puts the fact sentences at random places between the filler sentences."""
    return " ".join(_scattered(rng, filler, facts))


def scatter_around(
    rng: random.Random, filler: list[str], others: list[str], asked: str, depth: float
) -> str:
    """As `scatter`, but with the asked sentence after a share of `depth`, 0..1, of the rest."""
    sentences = _scattered(rng, filler, others)
    sentences.insert(round(depth * len(sentences)), asked)
    return " ".join(sentences)


def _scattered(rng: random.Random, filler: list[str], facts: list[str]) -> list[str]:
    slots = sorted(rng.randint(0, len(filler)) for _ in facts)
    shuffled = rng.sample(facts, len(facts))
    sentences = list(filler)
    for slot, sentence in reversed(list(zip(slots, shuffled, strict=True))):
        sentences.insert(slot, sentence)
    return sentences


def _fill(
    rng: random.Random, budget: int, fixed: str, count_tokens: Callable[[str], int]
) -> list[str]:
    """Writes filler sentences until `fixed` and they together are about `budget` tokens long."""
    filler: list[str] = []
    total = count_tokens(fixed)
    while total < budget:
        sentence = filler_sentence(rng)
        filler.append(sentence)
        total += count_tokens(" " + sentence)
    return filler


def make_case(
    seed: int,
    target_tokens: int,
    num_facts: int,
    count_tokens: Callable[[str], int],
    depth: float | None = None,
) -> NeedleCase:
    """Makes one case whose chat prompt is at most, and nearly, `target_tokens` long.

    depth: share of the document, 0..1, before the fact that is asked for; None: anywhere.
    """
    if not MIN_TOKENS <= target_tokens <= MAX_TOKENS:
        raise ValueError(f"target_tokens must be {MIN_TOKENS}..{MAX_TOKENS}, not {target_tokens}")
    if not 1 <= num_facts <= MAX_FACTS:
        raise ValueError(f"num_facts must be 1..{MAX_FACTS}, not {num_facts}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be 0..1, not {depth}")
    rng = random.Random(f"needle/{seed}/{target_tokens}/{num_facts}")
    facts = make_facts(rng, num_facts)
    sentences = [fact_sentence(rng, fact) for fact in facts]
    asked = rng.choice(facts)
    question = question_for(rng, asked)
    budget = target_tokens - TEMPLATE_RESERVE
    filler = _fill(rng, budget, join_prompt(" ".join(sentences), question), count_tokens)
    layout = rng.getrandbits(64)
    wanted = sentences[facts.index(asked)]
    others = [sentence for sentence in sentences if sentence is not wanted]
    while True:
        if depth is None:
            document = scatter(random.Random(layout), filler, sentences)
        else:
            document = scatter_around(random.Random(layout), filler, others, wanted, depth)
        # Sentence counts need not add up exactly in every tokenizer, so the whole is measured.
        if not filler or count_tokens(join_prompt(document, question)) <= budget:
            return NeedleCase(document, question, asked.value, num_facts, target_tokens)
        filler.pop()
