"""Streamed text is exactly the text that the tokenizers library gives for all ids at once."""

from collections.abc import Sequence
from functools import cache

import pytest
from call_counts import num_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kvmesh.services.tokenizer.detokenize import Detokenizer, Emission, StopMatcher
from kvmesh.services.tokenizer.pieces import MAX_WINDOW, PieceTable, byte_alphabet

from .tokenizer_models import byte_fallback, byte_level, metaspace, word_piece

MAKERS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_no_strip": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "metaspace_always": lambda: metaspace("always"),
    "word_piece": word_piece,
}
EXACT = ["byte_level", "byte_fallback", "byte_fallback_no_strip"]
PADDING = 3  # ids of the model that the tokenizer has no token for


@cache
def model(kind: str) -> tuple[Tokenizer, PieceTable]:
    tokenizer = MAKERS[kind]()
    return tokenizer, PieceTable(tokenizer, tokenizer.get_vocab_size() + PADDING)


@cache
def byte_ids(kind: str) -> tuple[int, ...]:
    """The id of each byte, so that tests can write characters that no token has whole."""
    tokenizer, _ = model(kind)
    letters = {byte: char for char, byte in byte_alphabet().items()}
    names = [letters[b] if kind == "byte_level" else f"<0x{b:02X}>" for b in range(256)]
    vocab = tokenizer.get_vocab()
    return tuple(vocab[name] for name in names)


@st.composite
def id_lists(draw: st.DrawFn, kind: str) -> list[int]:
    """Any ids, mixed with whole and broken characters as single bytes."""
    tokenizer, _ = model(kind)
    any_id = st.lists(st.integers(0, tokenizer.get_vocab_size() + PADDING - 1), max_size=6)
    if kind not in EXACT:
        return draw(any_id)
    as_ids = byte_ids(kind)
    character = st.sampled_from("aé你😀\ufffd\x00 \n").map(
        lambda c: [as_ids[b] for b in c.encode()]
    )
    broken = st.binary(max_size=4).map(lambda data: [as_ids[b] for b in data])
    parts = draw(st.lists(st.one_of(any_id, character, broken), max_size=12))
    return [token_id for part in parts for token_id in part]


def stream(
    detokenizer: Detokenizer, ids: Sequence[int], sizes: Sequence[int] = ()
) -> tuple[list[Emission], str]:
    """Feeds `ids` in parts of `sizes`, then one by one, until it stops."""
    emissions: list[Emission] = []
    at = 0
    for size in [*sizes, *[1] * len(ids)]:
        emissions.append(detokenizer.feed(ids[at : at + size]))
        at += size
        if emissions[-1].stopped:
            break
    else:
        emissions.append(detokenizer.feed((), end=True))
    return emissions, "".join(emission.text for emission in emissions)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_parts_joined_are_the_whole(kind: str, keep: bool, data: st.DataObject) -> None:
    tokenizer, table = model(kind)
    ids = data.draw(id_lists(kind))
    whole = tokenizer.decode(ids, skip_special_tokens=not keep)
    _, text = stream(Detokenizer(table.open(keep)), ids)
    assert text == whole
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=8))
    _, regrouped = stream(Detokenizer(table.open(keep)), ids, sizes)
    assert regrouped == whole


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_was_said_stays_true_whatever_follows(kind: str, data: st.DataObject) -> None:
    """So a part of a character, or of a run that may turn out bad, is never said."""
    tokenizer, table = model(kind)
    ids, later = data.draw(id_lists(kind)), data.draw(id_lists(kind))
    said = Detokenizer(table.open()).feed(ids).text
    assert tokenizer.decode(ids).startswith(said)
    assert tokenizer.decode(ids + later).startswith(said)


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, int] | None:
    """Independent of the matcher: start and end of what is complete first, the longest of it."""
    for end in range(1, len(text) + 1):
        lengths = [len(s) for s in stop if text[:end].endswith(s)]
        if lengths:
            return end - max(lengths), end
    return None


# Two letters make stop strings that overlap themselves and each other.
alphabets = st.sampled_from(["ab", "ab é你\n"])


@settings(max_examples=400, deadline=None)
@given(alphabet=alphabets, include=st.booleans(), data=st.data())
def test_matcher_agrees_with_a_search_however_text_is_cut(
    alphabet: str, include: bool, data: st.DataObject
) -> None:
    text = data.draw(st.text(alphabet, max_size=30))
    one = st.text(alphabet, min_size=1, max_size=6)
    stop = data.draw(st.lists(one, min_size=1, max_size=3))
    matcher = StopMatcher(stop, include)
    out, stopped, at = "", False, 0
    while at < len(text) and not stopped:
        size = data.draw(st.integers(1, 5))
        part, stopped = matcher.push(text[at : at + size])
        out += part
        at += size
        if not stopped:
            seen = text[:at]
            # Held back is what may become a stop string, and not a character more.
            may_become = [n for s in stop for n in range(len(s)) if seen.endswith(s[:n])]
            assert len(seen) - len(out) == max(may_become)
    found = first_stop(text, stop)
    if found is None:
        assert not stopped and out + matcher.flush() == text
    else:
        assert stopped and out == text[: found[1] if include else found[0]]


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stop_ends_at_the_first_id_whose_text_has_it(kind: str, data: st.DataObject) -> None:
    tokenizer, table = model(kind)
    ids = data.draw(id_lists(kind))
    stop = data.draw(st.lists(st.text("aélo你 \n", min_size=1, max_size=3), min_size=1, max_size=3))
    emissions, text = stream(Detokenizer(table.open(), stop), ids)
    texts = (tokenizer.decode(ids[:n]) for n in range(len(ids) + 1))
    first = next(((n, t) for n, t in enumerate(texts) if any(s in t for s in stop)), None)
    if first is None:
        assert not emissions[-1].stopped and text == tokenizer.decode(ids)
        return
    found = first_stop(first[1], stop)
    assert found is not None
    assert emissions[-1].stopped
    assert emissions[-1].num_tokens == first[0]
    assert text == first[1][: found[0]]


def test_stop_string_that_overlaps_itself_is_found() -> None:
    assert StopMatcher(["aab"], include=False).push("aaab") == ("a", True)
    assert StopMatcher(["abab!"], include=False).push("ababab!") == ("ab", True)


def test_emoji_of_four_ids_comes_out_whole() -> None:
    _, table = model("byte_level")
    ids = [byte_ids("byte_level")[b] for b in "a😀b".encode()]
    emissions, _ = stream(Detokenizer(table.open()), ids)
    assert [e.text for e in emissions] == ["a", "", "", "", "😀", "b", ""]


def test_cut_off_character_becomes_one_replacement_at_the_end() -> None:
    _, table = model("byte_level")
    ids = [byte_ids("byte_level")[b] for b in "😀".encode()[:3]]
    detokenizer = Detokenizer(table.open())
    assert detokenizer.feed(ids).text == ""
    assert detokenizer.feed((), end=True) == ("\ufffd", False, 3)


def test_real_replacement_character_is_not_held_back() -> None:
    _, table = model("byte_level")
    ids = [byte_ids("byte_level")[b] for b in "\ufffd".encode()]
    assert Detokenizer(table.open()).feed(ids).text == "\ufffd"


def test_stop_string_is_met_before_its_run_of_bytes_ends() -> None:
    """In such models a line end is a byte token: waiting for the next id would be one too many."""
    _, table = model("byte_fallback")
    ids = [model("byte_fallback")[0].get_vocab()["a"], byte_ids("byte_fallback")[10]]
    detokenizer = Detokenizer(table.open(), ["\n"])
    assert detokenizer.feed(ids) == ("a", True, 2)


def test_included_stop_string_is_the_last_text() -> None:
    tokenizer, table = model("byte_level")
    ids = tokenizer.encode("the lazy dog", add_special_tokens=False).ids
    _, text = stream(Detokenizer(table.open(), ["zy d", "absent"], include_stop=True), ids)
    assert text == "the lazy d"


def test_special_ids_are_silent_unless_kept() -> None:
    tokenizer, table = model("byte_level")
    ids = tokenizer.encode("<|user|>the</s>", add_special_tokens=False).ids
    assert stream(Detokenizer(table.open()), ids)[1] == "the"
    assert stream(Detokenizer(table.open(True)), ids)[1] == "<|user|>the</s>"


@pytest.mark.parametrize("kind", MAKERS)
def test_cost_of_an_id_does_not_grow(kind: str) -> None:
    """Many bad ids later, an id makes no more calls and holds no longer text than before."""
    _, table = model(kind)
    bad = byte_ids(kind)[0x80] if kind == "byte_level" else 5
    detokenizer = Detokenizer(table.open(), ["absent"])

    def work() -> int:
        return num_calls(lambda: [detokenizer.feed([bad]) for _ in range(100)])

    work()
    first = work()
    detokenizer.feed([bad] * 10_000)
    assert work() <= first


def test_decoder_of_unknown_kind_holds_back_a_bounded_window() -> None:
    tokenizer, table = model("metaspace")
    decoder = table.open()
    silent = tokenizer.get_vocab_size()  # padding: decodes to nothing
    for _ in range(10 * MAX_WINDOW):
        decoder.feed(silent)
    assert len(decoder._window) <= 2 * MAX_WINDOW  # type: ignore[attr-defined]
