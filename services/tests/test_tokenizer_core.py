"""Prompts to ids: the same as the library gives, with a cache or without; and what is refused."""

import json
import random
import secrets
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.config import ModelConfig
from kvmesh.services.common.errors import ConfigError, InvalidRequest
from kvmesh.services.tokenizer.chat import ChatTemplate, load_chat_template
from kvmesh.services.tokenizer.core import CodecLimits, load_codec
from kvmesh.services.tokenizer.prefix import ENTRY_BYTES, PieceCache, PrefixEncoder
from kvmesh.services.tokenizer.servicer import _message, _tool
from kvmesh.v1 import inference_pb2

from .tokenizer_models import SPECIALS, byte_fallback, byte_level, metaspace, save, word_piece

CACHING = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
}
LONG = "the lazy dog and 123 foxes, 你好 😀. " * 8


@cache
def encoder(kind: str) -> tuple[Tokenizer, PrefixEncoder]:
    tokenizer = CACHING[kind]()
    return tokenizer, PrefixEncoder(tokenizer, PieceCache(1 << 20))


texts = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIALS, "<|user|", ">", "<|", "two words", LONG, " ", "\n\n", "\u2581"]
        ),
        st.text(max_size=8),
        st.text("helo wrd.a\u0301", max_size=200),
    ),
    max_size=14,
).map("".join)


@pytest.mark.parametrize("kind", CACHING)
@settings(max_examples=200, deadline=None)
@given(text=texts, data=st.data())
def test_cached_prefixes_never_change_the_ids(kind: str, text: str, data: st.DataObject) -> None:
    tokenizer, prefixes = encoder(kind)
    assert prefixes.caches
    cut = data.draw(st.integers(0, len(text)))
    other = text[:cut] + data.draw(texts)
    for prompt in (text, other, text):
        encoded = prefixes.encode(prompt)
        assert encoded.ids == tokenizer.encode(prompt, add_special_tokens=False).ids
        assert encoded.cached_chars <= len(prompt)
    assert prefixes.encode(text).cached_chars >= cacheable(text)
    salt = secrets.token_hex(8)
    foreign = prefixes.encode(text, salt)  # not faster for what others have sent
    assert foreign.ids == prefixes.encode(text).ids and foreign.cached_chars == 0
    assert prefixes.encode(text, salt).cached_chars >= cacheable(text)


def cacheable(text: str) -> int:
    """Where a text without special tokens is one piece, the second time all of it is cached."""
    whole = len(text) >= 128 and not any(token in text for token in SPECIALS)
    return len(text) if whole else 0


def test_next_turn_of_a_chat_finds_the_turns_before(tmp_path: Path) -> None:
    codec = load_codec(save(byte_level(), tmp_path), CodecLimits())
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG + "!"}]
    assert codec.encode_chat(turns[:1]).cached_chars == 0
    second = codec.encode_chat([*turns, {"role": "user", "content": "and now?"}])
    assert second.cached_chars == len("<s><|user|>" + LONG + "</s>")
    plain = load_codec(save(byte_level(), tmp_path), CodecLimits(cache_bytes=0))
    assert not plain.caches_prefixes
    expected = plain.encode_chat([*turns, {"role": "user", "content": "and now?"}])
    assert (second.ids, expected.cached_chars) == (expected.ids, 0)


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<|w|>", single_word=True, normalized=False),
        AddedToken("<|r|>", rstrip=True, normalized=False),
        AddedToken("<|l|>", lstrip=True, normalized=False),
    ],
)
def test_tokens_that_look_at_their_neighbours_turn_the_cache_off(token: AddedToken) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([token])
    prefixes = PrefixEncoder(tokenizer, PieceCache(1 << 20))
    assert not prefixes.caches
    text = f"{LONG} {token.content} {LONG}"
    for _ in range(2):
        assert prefixes.encode(text).ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_cache_keeps_to_its_bytes_and_drops_the_least_used() -> None:
    tokenizer = byte_level()
    rng = random.Random(7)
    prompts = ["".join(rng.choices("abcdefgh ", k=400)) for _ in range(40)]
    cache_ = PieceCache(20_000)
    prefixes = PrefixEncoder(tokenizer, cache_)
    for prompt in prompts:
        prefixes.encode(prompt)
        prefixes.encode(prompts[0])  # in use, so it stays
        assert cache_.num_bytes <= 20_000
    assert cache_.num_bytes > 20_000 - 4000
    assert prefixes.encode(prompts[0]).cached_chars == 400
    assert prefixes.encode(prompts[-1]).cached_chars == 400
    assert prefixes.encode(prompts[1]).cached_chars == 0
    tiny = PieceCache(ENTRY_BYTES)
    PrefixEncoder(tokenizer, tiny).encode(LONG)
    assert tiny.num_bytes == 0


def test_text_gets_the_tokens_of_the_post_processor_and_a_chat_does_not(tmp_path: Path) -> None:
    tokenizer = byte_level()
    codec = load_codec(save(tokenizer, tmp_path), CodecLimits())
    assert codec.encode_text("the dog").ids == tokenizer.encode("the dog").ids
    assert codec.encode_text("the dog").ids[0] == tokenizer.token_to_id("<s>")
    chat = codec.encode_chat([{"role": "user", "content": "the dog"}])
    text = "<s><|user|>the dog</s><|assistant|>"
    assert chat.ids == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(("add", "count"), [(True, 1), (False, 0)])
def test_begin_token_is_added_where_the_config_asks(tmp_path: Path, add: bool, count: int) -> None:
    tokenizer = metaspace()
    codec = load_codec(save(tokenizer, tmp_path, add_bos_token=add), CodecLimits())
    begin = tokenizer.get_vocab()["<s>"]
    assert codec.encode_text("hello").ids[:1].count(begin) == count
    assert codec.encode_text("<s>hello").ids.count(begin) == 1


def test_bundled_model_round_trip() -> None:
    codec = load_codec(checkpoint_path(ModelConfig()), CodecLimits())
    assert codec.caches_prefixes
    for text in ("The capital of France is Paris, 42.", "naïve 你好 😀\n\n\tend "):
        assert codec.decode(codec.encode_text(text).ids) == text
    chat = codec.encode_chat([{"role": "user", "content": "hi"}])
    said = codec.decode(chat.ids, keep_special_tokens=True)
    assert said == "<|begin|><|user|>hi<|end|><|assistant|>"


def test_refusals_name_the_value_and_the_limit(tmp_path: Path) -> None:
    codec = load_codec(save(byte_level(), tmp_path), CodecLimits(max_text_bytes=10))
    assert codec.encode_text("é" * 5).ids
    with pytest.raises(InvalidRequest, match="the prompt has 12 bytes, must have at most 10"):
        codec.encode_text("é" * 6)
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        codec.encode_text("")
    with pytest.raises(InvalidRequest, match="no messages"):
        codec.encode_chat([])
    with pytest.raises(InvalidRequest, match="at most 10"):
        codec.encode_chat([{"role": "user", "content": "a" * 11}])
    for ids in ([codec.vocab_size], [0, 2**32 - 1]):
        with pytest.raises(InvalidRequest, match=rf"id {max(ids)} is outside the vocabulary of"):
            codec.decode(ids)
    with pytest.raises(InvalidRequest, match="stop string is empty"):
        codec.open_detokenizer(["a", ""])


def test_padded_vocabulary_of_the_model_counts(tmp_path: Path) -> None:
    tokenizer = byte_level()
    (save(tokenizer, tmp_path) / "config.json").write_text('{"text_config": {"vocab_size": 512}}')
    codec = load_codec(tmp_path, CodecLimits())
    assert codec.vocab_size == 512 > tokenizer.get_vocab_size()
    assert codec.decode([511]) == ""
    assert codec.open_detokenizer().feed([511], end=True).text == ""


def test_template_refuses_a_role_in_its_own_words(tmp_path: Path) -> None:
    codec = load_codec(save(byte_level(), tmp_path), CodecLimits())
    with pytest.raises(InvalidRequest, match="refuses the messages: unknown role robot"):
        codec.encode_chat([{"role": "robot", "content": "hi"}])
    bare = load_codec(save(byte_level(), tmp_path, chat_template=None), CodecLimits())
    with pytest.raises(InvalidRequest, match="no chat template"):
        bare.encode_chat([{"role": "user", "content": "hi"}])


def test_templates_are_found_where_checkpoints_have_them(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]

    def rendered(config: object) -> str:
        template = load_chat_template(tmp_path, {"chat_template": config, "eos_token": "E"})
        assert template is not None
        return template.render(messages)

    assert rendered("plain{{ eos_token }}") == "plainE"
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "usual"}]
    assert rendered(named) == "usual"
    assert rendered(named[:1]) == "tool"
    with pytest.raises(ConfigError, match="none of the chat templates"):
        rendered([*named[:1], {"name": "rag", "template": "x"}])
    with pytest.raises(ConfigError, match="line 1"):
        rendered("{% for %}")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered("plain") == "file"


def test_template_dialect_is_that_of_hugging_face() -> None:
    messages = [{"role": "user", "content": "<é> 'x'"}]
    source = (
        "{% for m in messages %}\n    {% generation %}\n{{ m | tojson }}\n    {% endgeneration %}\n"
        "{% break %}\n{% endfor %}\n{{ strftime_now('%Y') if strftime_now is defined else '-' }}"
    )
    expected = json.dumps(messages[0], ensure_ascii=False) + "\n"
    assert ChatTemplate(source, {}).render(messages) == expected + "-"
    dated = ChatTemplate(source, {}, lambda: datetime(2031, 5, 1))
    assert dated.render(messages) == expected + "2031"


@pytest.mark.parametrize(
    "source",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}{{ nothing.here }}", "{{ 1 / 0 }}"],
)
def test_template_that_misbehaves_is_a_refusal(source: str) -> None:
    with pytest.raises(InvalidRequest, match="refuses the messages"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        load_codec(tmp_path, CodecLimits())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer"):
        load_codec(tmp_path, CodecLimits())
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list, must be an object"):
        load_codec(tmp_path, CodecLimits())


def test_tools_and_calls_reach_a_template_that_knows_them() -> None:
    source = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<{{ c.function.arguments | tojson }}>{% endfor %}"
        "{{ m.tool_call_id or '' }}|{% endfor %}"
    )
    messages = [_message(message) for message in TOOL_TALK.messages]
    tools = [_tool(tool) for tool in TOOL_TALK.tools]
    assert ChatTemplate(source, {}).render(messages, tools) == (
        '[look]user:where?|assistant:<{"at": 1}>|tool:herec1|'
    )
    plain = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(InvalidRequest, match=r"1 tools are given.*no place for tools"):
        plain.render(messages, tools)


TOOL_TALK = inference_pb2.ChatPrompt(
    messages=[
        inference_pb2.ChatMessage(role="user", content="where?"),
        inference_pb2.ChatMessage(
            role="assistant",
            tool_calls=[inference_pb2.ToolCall(id="c1", name="look", arguments='{"at": 1}')],
        ),
        inference_pb2.ChatMessage(role="tool", content="here", tool_call_id="c1"),
    ],
    tools=['{"type": "function", "function": {"name": "look"}}'],
)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_a_tool_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="a tool is"):
        _tool(text)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_bytes_of_tokens_make_up_the_text(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    codec = load_codec(save(make(), tmp_path), CodecLimits())
    ids = codec.encode_text("the lazy dog").ids
    said = b"".join(codec.token(i) for i in ids).decode()
    assert "".join(said.split()).endswith("thelazydog")
    assert codec.token(1 << 20) == b""
