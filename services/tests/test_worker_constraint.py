"""Output constraints: against `re` and `json`, replayed at every place, and in a running worker."""

import json
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer
from worker_fakes import FakeModel, continuation
from worker_harness import attached, settled, worker

from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.config import ModelConfig
from kvmesh.services.common.errors import ConfigError, InvalidRequest
from kvmesh.services.common.sampling import OutputConstraint, SamplingSettings, check_sampling
from kvmesh.services.tokenizer.pieces import byte_alphabet
from kvmesh.services.worker.constraint import GrammarMatcher, Grammars, open_grammars
from kvmesh.services.worker.sampler import Choice, sample
from kvmesh.v1 import common_pb2

FOLDER = checkpoint_path(ModelConfig())
VOCAB = 1088
EOS = 2
CODE = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yé"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
REGEX = OutputConstraint("regex", "(cat|dog)s? [0-9]{1,3}")
JSON = OutputConstraint("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return open_grammars(FOLDER, VOCAB, (EOS,))


def ramble(matcher: GrammarMatcher, seed: int, output: Sequence[int] = ()) -> list[int]:
    """What random logits say under a constraint, from `output` on, until it is complete."""
    ids = list(output)
    settings = SamplingSettings(temperature=1.0, seed=seed)
    while not matcher.done and len(ids) < 200:
        position = len(ids)
        logits = np.random.default_rng((seed, position)).normal(0, 1, (1, VOCAB))
        choice = Choice(settings, position, allowed=matcher.allowed())
        (found,) = sample(logits.astype(np.float32), [choice])
        assert found is not None
        ids.append(found.token)
        matcher.advance(found.token)
    return ids


@pytest.mark.parametrize("seed", range(10))
def test_what_random_logits_say_matches(grammars: Grammars, seed: int) -> None:
    said = CODE.decode(ramble(grammars.open(REGEX), seed))
    assert re.fullmatch(REGEX.text, said)
    text = CODE.decode(ramble(grammars.open(JSON), seed))
    if text.endswith("}"):  # a random integer may not end within 200 tokens
        found = json.loads(text)
        assert isinstance(found["a"], int) and found["b"] in ("x", "yé")


def test_a_replayed_output_goes_on_as_if_it_had_never_moved(grammars: Grammars) -> None:
    whole = ramble(grammars.open(JSON), 3)
    for place in range(len(whole)):
        moved = grammars.open(JSON, whole[:place])
        assert ramble(moved, 3, whole[:place]) == whole, place


def test_the_mask_allows_what_the_grammar_does(grammars: Grammars) -> None:
    """Against trying each token's text: is some match left that begins with it?"""
    matcher = grammars.open(OutputConstraint("regex", "ab{2}"))
    allowed = {CODE.decode([i]) for i in np.flatnonzero(matcher.allowed()).tolist()}
    texts = {CODE.decode([i]) for i in range(6, VOCAB)} - {""}
    assert allowed == {text for text in texts if "abb".startswith(text)}


def test_an_end_id_is_allowed_where_the_output_is_whole(grammars: Grammars) -> None:
    matcher = grammars.open(OutputConstraint("regex", "ab*"))
    assert not matcher.allowed()[EOS]
    for char in "abb":
        matcher.advance(CODE.token_to_id(char))
        assert matcher.allowed()[EOS] and not matcher.done
    ended = grammars.open(OutputConstraint("regex", "ab"), [CODE.token_to_id(c) for c in "ab"])
    assert ended.done


def test_matchers_of_one_constraint_do_not_share_their_place(grammars: Grammars) -> None:
    one, other = grammars.open(REGEX), grammars.open(REGEX)
    one.advance(CODE.token_to_id("c"))
    assert other.allowed()[CODE.token_to_id("d")] and not one.allowed()[CODE.token_to_id("d")]


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (OutputConstraint("regex", "[a-z"), "constraint.regex.*unclosed character class"),
        (OutputConstraint("regex", "(?=a)b"), "look-around"),
        (OutputConstraint("json_schema", "{"), "constraint.json_schema"),
        (OutputConstraint("json_schema", "[1]"), "object"),
        (OutputConstraint("json_schema", '{"type":"nope"}'), "nope"),
        (OutputConstraint("json_schema", '{"type":"array","uniqueItems":true}'), "uniqueItems"),
        (OutputConstraint("json_schema", '{"$ref":"http://a/b"}'), "http://a/b"),
    ],
)
def test_what_is_wrong_is_named(
    grammars: Grammars, constraint: OutputConstraint, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        grammars.open(constraint)
    assert len(str(caught.value)) < 600


def test_an_output_that_does_not_match_cannot_be_replayed(grammars: Grammars) -> None:
    with pytest.raises(InvalidRequest, match="1 output tokens so far do not match"):
        grammars.open(REGEX, [CODE.token_to_id("x")])


def test_limits_of_the_field() -> None:
    def params(**fields: str) -> common_pb2.SamplingParams:
        return common_pb2.SamplingParams(constraint=common_pb2.OutputConstraint(**fields))

    assert check_sampling(params(regex="a"), 9).constraint == OutputConstraint("regex", "a")
    with pytest.raises(InvalidRequest, match="is empty"):
        check_sampling(params(), 9)
    with pytest.raises(
        InvalidRequest, match=r"constraint.regex has 65537 bytes, must have 1..65536"
    ):
        check_sampling(params(regex="a" * 65537), 9)


def test_a_folder_without_a_tokenizer(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.json"):
        open_grammars(FOLDER / "none", VOCAB, ())
    with pytest.raises(ConfigError, match="1088"):  # more tokens than the model has logits
        open_grammars(FOLDER, 101, ())


# The fake model's vocabulary as a tokenizer: each id is one byte, from "!" on.
LETTERS = list(byte_alphabet())
TINY = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
        "model": {"type": "BPE", "vocab": {LETTERS[i]: i for i in range(101)}, "merges": []},
    }
)


async def test_a_worker_masks_ends_and_refuses() -> None:
    grammars = Grammars(TINY, 101, (7,))
    letters = "".join(LETTERS[20:23])
    rng = random.Random(1)
    prompt = [rng.randrange(101) for _ in range(90)]
    async with worker(FakeModel()) as (service, address), attached(address) as router:
        service.hub.grammars = grammars
        regex = {"constraint": {"regex": f"[{letters}]{{5}}"}}
        await router.submit("a", prompt, sampling=regex)
        end = await router.end_of("a")
        assert end.finish_reason == common_pb2.FINISH_REASON_STOP
        said = router.tokens["a"]
        assert len(said) == 5 and set(said) <= {20, 21, 22}

        moved = [*prompt, *said[:3]]  # to another worker, after three tokens
        await router.submit("b", moved, num_prompt_tokens=len(prompt), sampling=regex)
        await router.end_of("b")
        assert router.tokens["b"] == said[3:]

        await router.submit("c", prompt, sampling={"constraint": {"regex": "["}})
        refused = await router.end_of("c")
        assert refused.error.code == 3 and "unclosed" in refused.error.message
        await router.submit("d", prompt, sampling=regex, cancelled=True)
        await router.end_of("d")
        service.hub.grammars = None
        await router.submit("e", prompt, sampling=regex)
        assert "no vocabulary" in (await router.end_of("e")).error.message
        await router.submit("f", prompt)
        await router.end_of("f")
        assert router.tokens["f"] == continuation(prompt, 20)
        await settled(service)
