"""Questions through a real mesh, and how their scores are counted."""

import json
from pathlib import Path

import pytest
from meshes import tokenizer
from test_longbench import row, write

from kvmesh.integration.eval_plots import needle_plot
from kvmesh.integration.evaluate import (
    EvalCase,
    NeedlePlan,
    Score,
    differences,
    evaluate,
    merged,
    needle_cases,
    score_all,
)
from kvmesh.integration.loadgen import RequestResult
from kvmesh.integration.longbench import LongBenchPlan, longbench_cases
from kvmesh.integration.ruler import RulerPlan, ruler_cases
from kvmesh.services.common.config import ModelConfig


def count(text: str) -> int:
    return len(tokenizer().encode(text, add_special_tokens=False).ids)


def test_needles_lie_at_their_depth() -> None:
    plan = NeedlePlan((512,), (0.0, 0.5, 1.0), cases=12)
    cases = needle_cases(plan, count)
    assert [case.group[1] for case in cases[:4]] == ["0%", "50%", "100%", "0%"]
    for case in cases:
        document = case.prompt.rsplit("\n\n", 1)[0]
        sentences = document.split(". ")
        (at,) = [i for i, sentence in enumerate(sentences) if _answers(case, sentence)]
        wanted = float(case.group[1].rstrip("%")) / 100
        assert abs(at / (len(sentences) - 1) - wanted) < 0.05, case.group
    with pytest.raises(ValueError, match="depth must be"):
        needle_cases(NeedlePlan((512,), (1.5,), 1), count)


def _answers(case: EvalCase, sentence: str) -> bool:
    return any(case.score(word.rstrip(".")) for word in sentence.split())


def test_a_failed_request_counts_as_wrong() -> None:
    cases = [EvalCase(("a", str(i // 2)), "", lambda text: float(text == "x"), 1) for i in range(4)]
    results = [
        RequestResult("x"),
        RequestResult("y"),
        RequestResult("x", error="E"),
        RequestResult("x"),
    ]
    scores = score_all("k4v4", cases, results)
    assert [(s.group, s.mean, s.errors) for s in scores] == [
        (("a", "0"), 0.5, 0),
        (("a", "1"), 0.5, 1),
    ]
    (whole,) = merged(scores, 0)
    assert (whole.group, whole.cases, whole.mean, whole.errors) == (("a",), 4, 0.5, 1)
    assert whole.answers == [1, 0, 0, 1]
    better = score_all("fp16", cases, [RequestResult("x")] * 4)
    found = differences([*better, *scores])
    assert list(found) == ["k4v4"]
    assert (found["k4v4"].cases, found["k4v4"].lost, found["k4v4"].won) == (4, 2, 0)
    assert json.dumps(whole.as_json())
    assert Score("k4v4", ()).mean == 0


async def test_a_mesh_answers_questions_of_every_kind(tmp_path: Path) -> None:
    """mini knows needles, and text of no kind else: the others must run, not be right."""
    needles = needle_cases(NeedlePlan((256, 512), (0.0, 1.0), cases=4), count)
    others = ruler_cases(RulerPlan(("single", "multivalue", "variables"), (1024,), 1), count)
    write(tmp_path, "hotpotqa", row())
    write(tmp_path, "lcc", row(answers=["return best"]))
    benches = longbench_cases(LongBenchPlan(tmp_path, 1000), tokenizer())
    cases = [*needles, *others, *benches]
    done: list[RequestResult] = []
    results = await evaluate(ModelConfig(codec="k3v3"), cases, done.append)
    assert len(done) == len(results) == len(cases)
    assert [result.error for result in results if result.error] == []
    scores = score_all("k3v3", cases, results)
    exact = sum(score.total for score in scores[: len({n.group for n in needles})])
    assert exact >= len(needles) - 1, [result.text for result in results]
    text = needle_plot("k3v3", scores[: len({n.group for n in needles})])
    assert "100%" in text and ">512<" in text
