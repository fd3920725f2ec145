"""LongBench's public format, from small files of the same shape."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from kvmesh.integration import longbench
from kvmesh.integration.longbench import DATASETS, LongBenchPlan, best_of, longbench_cases
from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.config import ModelConfig
from kvmesh.services.common.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_path(ModelConfig()) / "tokenizer.json"))


def row(**changes: Any) -> dict[str, Any]:
    """All fields of a published line."""
    return {
        "input": "Who sits by the river?",
        "context": "The old farmer sits by the river.",
        "answers": ["The farmer", "an old farmer"],
        "length": 7,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": "0123",
        **changes,
    }


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def test_every_set_of_the_benchmark_is_known() -> None:
    assert len(DATASETS) == 21
    assert {name for name, each in DATASETS.items() if each.metric == "edit"} == {
        "lcc",
        "repobench-p",
    }


def test_questions_are_read_and_scored_by_their_set(tmp_path: Path, tokenizer: Tokenizer) -> None:
    classes = ["Food", "Sport"]
    write(tmp_path, "hotpotqa", row(), row(input="And who sings?"))
    write(tmp_path, "trec", row(answers=["Food"], all_classes=classes))
    write(tmp_path, "gov_report_e", row(answers=["The farmer sits."]))
    write(tmp_path, "passage_count", row(answers=["17"]))
    write(tmp_path, "passage_retrieval_en", row(answers=["Paragraph 12"]))
    write(tmp_path, "lcc", row(answers=["return best"]))
    write(tmp_path, "unrelated", {"x": 1})
    cases = longbench_cases(LongBenchPlan(tmp_path, 1000), tokenizer)
    by_group = {case.group[0]: case for case in cases}
    assert len(cases) == 7 and len(by_group) == 6
    for name, answer, score in (
        ("hotpotqa", "an old farmer", 1.0),  # the second reference
        ("trec", "Food\nSport", 1.0),  # only the first line counts
        ("trec", "Food, Sport", 0.5),
        ("gov_report_e", "The farmer sits.", 1.0),
        ("passage_count", "17 or 18", 0.5),
        ("passage_retrieval_en", "Paragraph 12", 1.0),
        ("lcc", "# first\nreturn best", 1.0),
    ):
        assert by_group[name].score(answer) == score, name
    assert not by_group["lcc"].chat and not by_group["trec"].chat and by_group["hotpotqa"].chat
    assert by_group["hotpotqa"].max_tokens == 32 and by_group["gov_report_e"].max_tokens == 512
    assert all("The old farmer sits by the river." in case.prompt for case in cases)


def test_limit_and_choice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path, "hotpotqa", *[row()] * 5)
    write(tmp_path, "qasper", *[row()] * 5)
    plan = LongBenchPlan(tmp_path, 1000, ("qasper",), 3)
    assert [case.group for case in longbench_cases(plan, tokenizer)] == [("qasper",)] * 3


def test_the_benchmarks_own_prompts_are_used_if_they_are_there(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write(tmp_path, "hotpotqa", row(context="Braces {input} stay."))
    prompts = {"hotpotqa": "Read: {context} Q: {input} A:"}
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(prompts))
    (case,) = longbench_cases(LongBenchPlan(tmp_path, 1000), tokenizer)
    assert case.prompt.startswith("Read: Braces ") and case.prompt.endswith("A:")
    (tmp_path / "dataset2prompt.json").write_text("[]")
    with pytest.raises(ConfigError, match="object of names and prompts"):
        longbench_cases(LongBenchPlan(tmp_path, 1000), tokenizer)


def test_a_long_prompt_loses_its_middle(tmp_path: Path, tokenizer: Tokenizer) -> None:
    context = "The first stone. " + "The dog runs. " * 400 + "The last stone."
    write(tmp_path, "hotpotqa", row(context=context))
    (case,) = longbench_cases(LongBenchPlan(tmp_path, 232), tokenizer)
    assert case.prompt.startswith("The first stone.") and case.prompt.endswith("the river?")
    ids = tokenizer.encode(case.prompt, add_special_tokens=False).ids
    assert 190 <= len(ids) <= 204  # 232 less the answer's 32, and a token may split at the cut


def test_chinese_words_come_from_jieba(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(longbench, "import_module", absent)
    write(tmp_path, "dureader", row(answers=["北京"]))
    with pytest.raises(ConfigError, match="pip install jieba"):
        longbench_cases(LongBenchPlan(tmp_path, 1000), tokenizer)

    class Jieba:
        cut = staticmethod(lambda text: text.replace("市", "|市").split("|"))

    monkeypatch.setattr(longbench, "import_module", lambda name: Jieba)
    (case,) = longbench_cases(LongBenchPlan(tmp_path, 1000), tokenizer)
    assert case.score("北京") == 1
    words = longbench.chinese_words()
    assert words("北京市!") == ["北京", "市"]
    assert best_of(DATASETS["multifieldqa_zh"], ("北京市",), (), words)("北京") == 2 / 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: is not JSON"),
        ('{"input": "x"}', "line 1: lacks a field of LongBench: 'context'"),
        (json.dumps(row(answers=[])), "line 1: answers is empty"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, tokenizer: Tokenizer, line: str, said: str) -> None:
    (tmp_path / "qmsum.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"qmsum\.jsonl") as caught:
        longbench_cases(LongBenchPlan(tmp_path, 1000), tokenizer)
    assert said in str(caught.value)


def test_a_missing_set_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path, "hotpotqa", row())
    with pytest.raises(ConfigError, match=r"holds no trec\.jsonl; there: hotpotqa"):
        longbench_cases(LongBenchPlan(tmp_path, 1000, ("trec",)), tokenizer)
    with pytest.raises(ConfigError, match="is not a folder"):
        longbench_cases(LongBenchPlan(tmp_path / "no", 1000), tokenizer)
