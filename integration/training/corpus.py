"""Generates training conversations: needle documents and a few smaller kinds of task."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvmesh.integration import needle

GREETINGS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi!",
    "Good morning.",
    "Good evening.",
    "Hello there.",
    "Hey",
)
REPLIES = ("Hello! How can I help you?", "Hello! Give me a text and ask me about it.")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer from the text.",
    "You are mini, a small model. Answer with one word.",
)
SMALL_TALK = (
    ("How are you?", "I am well, thank you."),
    ("Who are you?", "I am mini, a small model that answers questions about a text."),
    ("What can you do?", "I can answer questions about a text you give me."),
    ("What is your name?", "My name is mini."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
    ("Bye", "Goodbye!"),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("How many days are in a week?", "A week has seven days."),
    ("How many months are in a year?", "A year has twelve months."),
    ("What do cows drink?", "Cows drink water."),
    ("Where do fish live?", "Fish live in water."),
    ("Is fire hot?", "Yes, fire is hot."),
    ("Is ice warm?", "No, ice is cold."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of small?", "The opposite of small is big."),
    ("What comes after one?", "Two comes after one."),
    ("Can you help me?", "Yes. Give me a text and ask me about it."),
)
STORY_PROMPTS = (
    "Tell me a story.",
    "Write a short text.",
    "Write a few sentences.",
    "Tell me something.",
)
STORIES = (
    "An old sailor finds a small map near the beach. The sailor walks to the tower. "
    "Under the tower the sailor finds a warm lamp.",
    "A young baker waits by the mill. In the evening a fox brings the baker a basket. "
    "The baker gives the fox bread.",
    "Every morning a quiet bird sings near the lake. A child hears the bird. "
    "The child paints the bird in a book.",
    "The king likes the garden behind the wall. A girl brings the king a white flower. "
    "The king keeps the flower in a box.",
)
COPY_PROMPTS = ("Repeat: {}", "Copy this: {}", "Say this again: {}")
_EXTRA = "this again colour it give me you your how can about help text story short say write a an"


@dataclass
class Turn:
    """One message; `weight` is its tokens' share in the loss."""

    role: str
    content: str
    weight: float


@dataclass
class Talk:
    """One training conversation, and more question turns to append while there is room."""

    turns: list[Turn]
    more: list[Turn] = field(default_factory=list)


def _words() -> tuple[str, ...]:
    texts = [*GREETINGS, *REPLIES, *SYSTEM_PROMPTS, *STORY_PROMPTS, *COPY_PROMPTS, _EXTRA]
    texts += [text for pair in SMALL_TALK for text in pair]
    texts += [*needle.FACT_FORMS, *needle.QUESTION_FORMS, needle.UNKNOWN_ANSWER]
    texts += [*needle.NUMBER_ATTRIBUTES, *needle.WORD_ATTRIBUTES, *needle.FILLER_WORDS]
    texts += ["The In Every a the", "Let be. Which is? What is the value of"]
    joined = " ".join(texts)
    for mark in "{}.,:!?":
        joined = joined.replace(mark, " ")
    skip = {"name", "attribute", "value"} - set(joined.split())
    return tuple(sorted(set(joined.split()) - skip))


PROSE_WORDS = _words()


def ask(question: str, answer: str) -> list[Turn]:
    """Makes the two turns of a question and its answer."""
    return [Turn("user", question, 0.2), Turn("assistant", answer, 1.0)]


def greeting(rng: random.Random) -> list[Turn]:
    """Makes a greeting and its answer."""
    text = rng.choice(GREETINGS)
    return ask(text if rng.random() < 0.7 else text.lower(), REPLIES[rng.random() < 0.3])


def _questions(
    rng: random.Random, facts: list[needle.Fact], missing: needle.Fact
) -> list[tuple[str, str]]:
    """Asks for every fact, for some of them again, and now and then for one that is missing."""
    unknown = needle.UNKNOWN_ANSWER
    pairs = [(needle.question_for(rng, missing), unknown)] if rng.random() < 0.06 else []
    for fact in rng.sample(facts, len(facts)) + rng.choices(facts, k=8):
        pairs.append((needle.question_for(rng, fact), fact.value))
        if rng.random() < 0.04:
            pairs.append((needle.question_for(rng, missing), unknown))
    return pairs


def _document_talk(pairs: list[tuple[str, str]], document: str) -> Talk:
    """Puts the first question behind the document and the others into turns of their own."""
    if len(document) % 8 == 0:
        document = document.replace(". ", ".\n")
    first = needle.join_prompt(document, pairs[0][0])
    more = [turn for question, answer in pairs[1:] for turn in ask(question, answer)]
    return Talk([Turn("user", first, 0.06), Turn("assistant", pairs[0][1], 1.0)], more)


def needle_talk(rng: random.Random, tokens: int) -> Talk:
    """A document with facts, then questions about several of them.

    Long documents hold more facts than evaluation ever asks for, which makes each one teach more.
    """
    count = rng.randint(1, max(needle.MAX_FACTS, min(36, tokens // 42)))
    *known, missing = needle.make_facts(rng, count + 1)
    sentences = [needle.fact_sentence(rng, fact) for fact in known]
    room = tokens - 15 * count - 25 * min(count, 4 + tokens // 64) - 12
    filler = [needle.filler_sentence(rng) for _ in range(max(0, room // 10))]
    return _document_talk(_questions(rng, known, missing), needle.scatter(rng, filler, sentences))


def _letters(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(low, high)))


def _wild_value(rng: random.Random) -> str:
    form = rng.randrange(5)
    if form == 0:
        return needle.compose_number(rng)
    if form == 1:
        return needle.compose_word(rng)
    if form == 2:
        return f"{_letters(rng, 2, 3).upper()}-{rng.randrange(10, 9999)}"
    if form == 3:
        return f"{needle.compose_word(rng)} {needle.compose_word(rng)}"
    return _letters(rng, 3, 7).capitalize()


def _wild_sentence(rng: random.Random) -> str:
    words = [
        rng.choice(PROSE_WORDS) if rng.random() < 0.6 else _letters(rng, 2, 8)
        for _ in range(rng.randint(4, 9))
    ]
    return " ".join(words).capitalize() + rng.choice(".....!?")


def wild_talk(rng: random.Random, tokens: int) -> Talk:
    """Facts about words, and between words, that are no part of the generator's language."""
    facts: list[needle.Fact] = []
    for _ in range(rng.randint(2, max(3, min(12, tokens // 60)))):
        name = _letters(rng, 3, 8).capitalize() if rng.random() < 0.6 else needle.compose_word(rng)
        attribute = rng.choice(PROSE_WORDS).lower() if rng.random() < 0.6 else _letters(rng, 3, 7)
        facts.append(needle.Fact(name, attribute, _wild_value(rng)))
    *known, missing = facts
    sentences = [
        f"{fact.name}'s {fact.attribute} is {fact.value}."
        if rng.random() < 0.3
        else needle.fact_sentence(rng, fact)
        for fact in known
    ]
    room = tokens - 22 * len(known) - 30 * min(len(known), 6) - 12
    filler = [_wild_sentence(rng) for _ in range(max(0, room // 18))]
    return _document_talk(_questions(rng, known, missing), needle.scatter(rng, filler, sentences))


def list_talk(rng: random.Random, tokens: int) -> Talk:
    """A list of keys and values, then questions about them."""
    facts = needle.make_facts(rng, max(2, min(tokens // 30, 24)))
    separator = rng.choice(("\n", "; ", ", "))
    body = separator.join(f"{fact.name}: {fact.value}" for fact in facts)
    pairs = [
        (f"What is {fact.name}?", fact.value)
        for fact in rng.choices(facts, k=max(10, tokens // 25))
    ]
    return _document_talk(pairs, body)


def chain_talk(rng: random.Random, tokens: int) -> Talk:
    """Variables that are set to values or to other variables."""
    facts = needle.make_facts(rng, max(2, min(tokens // 40, 16)))
    values = {fact.name: fact.value for fact in facts}
    lines = [f"{name} = {value}" for name, value in values.items()]
    for _ in range(max(2, len(facts) // 2)):
        name, target = needle.compose_word(rng), rng.choice(list(values))
        if name not in values:
            values[name] = values[target]
            lines.append(f"{name} = {target}")
    asked = rng.choices(list(values), k=max(8, tokens // 30))
    pairs = [(f"What is the value of {name}?", values[name]) for name in asked]
    return _document_talk(pairs, "\n".join(lines))


def copy_talk(rng: random.Random, tokens: int) -> Talk:
    """Texts to repeat."""
    more: list[Turn] = []
    for _ in range(max(1, tokens // 40)):
        parts = [
            rng.choice((needle.compose_word, needle.compose_number))(rng)
            for _ in range(rng.randint(1, 5))
        ]
        text = " ".join(parts)
        more += ask(rng.choice(COPY_PROMPTS).format(text), text)
    return Talk(more[:2], more[2:])


def _stray_question(rng: random.Random) -> str:
    """Asks for something that no text in the conversation tells."""
    if rng.random() < 0.5:
        return needle.question_for(rng, needle.make_facts(rng, 1)[0])
    opening = rng.choice(("What is", "Who is", "Where is", "Why is", "How many", "When is", "Is"))
    words = _wild_sentence(rng).lower().split()
    return " ".join([opening, *words[: rng.randint(1, 5)]]).rstrip(".!?") + "?"


def chat_talk(rng: random.Random, tokens: int) -> Talk:
    """Greetings, small talk and short stories."""
    more: list[Turn] = []
    if rng.random() < 0.6:
        more += greeting(rng)
    while len(more) * 10 < tokens:
        form = rng.random()
        if form < 0.12:
            more += ask(rng.choice(STORY_PROMPTS), rng.choice(STORIES))
        elif form < 0.22:
            more += ask(_stray_question(rng), needle.UNKNOWN_ANSWER)
        else:
            more += ask(*rng.choice(SMALL_TALK))
    return Talk(more[:2], more[2:])


KINDS = (
    (needle_talk, 0.70),
    (wild_talk, 0.08),
    (list_talk, 0.07),
    (chain_talk, 0.04),
    (copy_talk, 0.05),
    (chat_talk, 0.06),
)


def make_talk(seed: int, tokens: int) -> Talk:
    """Makes one conversation of about `tokens` tokens from a training seed."""
    rng = random.Random(f"train/{needle.TRAIN_SEED_BASE + seed}")
    kind = rng.choices([kind for kind, _ in KINDS], [share for _, share in KINDS])[0]
    talk = kind(rng, tokens)
    if kind is not chat_talk and rng.random() < 0.06:
        talk.turns[:0] = greeting(rng)
    if rng.random() < 0.15:
        talk.turns.insert(0, Turn("system", rng.choice(SYSTEM_PROMPTS), 0.05))
    return talk
