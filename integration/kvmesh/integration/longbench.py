"""LongBench (Bai et al., 2308.14508) from the public files: one JSON line per question.

The folder holds `hotpotqa.jsonl` and the like, as published, also those of the set with even
lengths (`hotpotqa_e.jsonl`). If the benchmark's `dataset2prompt.json` lies there too, its prompts
are used; without it, prompts of our own that ask the same.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kvmesh.integration import metrics
from kvmesh.integration.evaluate import EvalCase
from kvmesh.services.common.errors import ConfigError

PROMPTS_FILE = "dataset2prompt.json"

# (answer, one reference, all classes) -> 0..1
Metric = Callable[[str, str, Sequence[str]], float]


@dataclass(frozen=True, slots=True)
class Dataset:
    """metric, max_tokens, chat (a user message, or text to go on from) and first_line (whether
    only the answer's first line counts) are the benchmark's; prompt is ours."""

    metric: str
    max_tokens: int
    prompt: str
    chat: bool = True
    first_line: bool = False
    chinese: bool = False


_QA = "{context}\n\nAnswer the question from the text above, in as few words as you can.\n{input}"
_SUMMARY = "{context}\n\nWrite a summary of the text above.\n{input}"
_SHOTS = "{context}\n{input}"
_QA_ZH = "{context}\n\n请根据上文回答问题, 尽量简短。\n{input}"
_SUMMARY_ZH = "{context}\n\n请总结上文。\n{input}"
_FIND = "{context}\n\nWhich paragraph does this summary describe? Answer like: Paragraph 7\n{input}"
_FIND_ZH = "{context}\n\n下面的摘要来自哪一段? 请回答, 例如: 段落7\n{input}"
_COUNT = "{context}\n\nHow many different paragraphs are there? Answer with the number.\n{input}"
_CODE = "{context}{input}"

DATASETS = {
    "narrativeqa": Dataset("f1", 128, _QA),
    "qasper": Dataset("f1", 128, _QA),
    "multifieldqa_en": Dataset("f1", 64, _QA),
    "multifieldqa_zh": Dataset("f1", 64, _QA_ZH, chinese=True),
    "hotpotqa": Dataset("f1", 32, _QA),
    "2wikimqa": Dataset("f1", 32, _QA),
    "musique": Dataset("f1", 32, _QA),
    "dureader": Dataset("rouge", 128, _QA_ZH, chinese=True),
    "gov_report": Dataset("rouge", 512, _SUMMARY),
    "qmsum": Dataset("rouge", 512, _SUMMARY),
    "multi_news": Dataset("rouge", 512, _SUMMARY),
    "vcsum": Dataset("rouge", 512, _SUMMARY_ZH, chinese=True),
    "trec": Dataset("class", 64, _SHOTS, chat=False, first_line=True),
    "triviaqa": Dataset("f1", 32, _SHOTS, chat=False, first_line=True),
    "samsum": Dataset("rouge", 128, _SHOTS, chat=False, first_line=True),
    "lsht": Dataset("class", 64, _SHOTS, chat=False, first_line=True, chinese=True),
    "passage_count": Dataset("count", 32, _COUNT),
    "passage_retrieval_en": Dataset("paragraph", 32, _FIND),
    "passage_retrieval_zh": Dataset("paragraph", 32, _FIND_ZH, chinese=True),
    "lcc": Dataset("edit", 64, _CODE, chat=False),
    "repobench-p": Dataset("edit", 64, _CODE, chat=False),
}


@dataclass(frozen=True, slots=True)
class LongBenchPlan:
    """datasets: none takes all that lie in the folder. limit: questions of each; none takes all.
    max_tokens: of a prompt; what is longer loses its middle, as in the benchmark."""

    folder: Path
    max_tokens: int
    datasets: tuple[str, ...] = ()
    limit: int | None = None


def longbench_cases(plan: LongBenchPlan, tokenizer: Tokenizer) -> list[EvalCase]:
    """Groups are (dataset,). Raises ConfigError naming the file, line and field that is wrong."""
    prompts = _prompts(plan.folder)
    cases = []
    for path in _files(plan):
        name = path.stem.removesuffix("_e")
        dataset = DATASETS[name]
        words = chinese_words() if dataset.chinese and dataset.metric in ("f1", "rouge") else None
        template = prompts.get(name, dataset.prompt)
        for row in _rows(path, plan.limit):
            text = template.replace("{context}", row.context).replace("{input}", row.input)
            text = cut_middle(text, plan.max_tokens - dataset.max_tokens, tokenizer)
            score = best_of(dataset, row.answers, row.classes, words)
            cases.append(EvalCase((path.stem,), text, score, dataset.max_tokens, dataset.chat))
    return cases


@dataclass(frozen=True, slots=True)
class _Row:
    context: str
    input: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


def _files(plan: LongBenchPlan) -> list[Path]:
    if not plan.folder.is_dir():
        raise ConfigError(f"{plan.folder} is not a folder; name the one with LongBench's .jsonl")
    found = {
        path.stem: path
        for path in sorted(plan.folder.glob("*.jsonl"))
        if path.stem.removesuffix("_e") in DATASETS
    }
    missing = [name for name in plan.datasets if name not in found]
    if missing or not found:
        there = ", ".join(found) or "none"
        raise ConfigError(
            f"{plan.folder} holds no {', '.join(missing) or 'LongBench'}.jsonl; there: {there}"
        )
    return [found[name] for name in plan.datasets or found]


def _rows(path: Path, limit: int | None) -> Iterable[_Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and number > limit:
                return
            if line.strip():
                yield _row(line, f"{path}, line {number}")


def _row(line: str, where: str) -> _Row:
    try:
        data: dict[str, Any] = json.loads(line)
        row = _Row(
            str(data["context"]),
            str(data["input"]),
            tuple(str(answer) for answer in data["answers"]),
            tuple(data.get("all_classes") or ()),
        )
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON: {error.msg}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where}: lacks a field of LongBench: {error}") from error
    if not row.answers:
        raise ConfigError(f"{where}: answers is empty, must hold at least one")
    return row


def _prompts(folder: Path) -> dict[str, str]:
    path = folder / PROMPTS_FILE
    if not path.is_file():
        return {}
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise ConfigError(f"{path}: must be an object of names and prompts")
    return prompts


def cut_middle(text: str, limit: int, tokenizer: Tokenizer) -> str:
    """`text`, or its first and last halves of `limit` tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) <= limit:
        return text
    half = limit // 2
    return str(tokenizer.decode(ids[:half])) + str(tokenizer.decode(ids[-half:]))


def best_of(
    dataset: Dataset,
    answers: Sequence[str],
    classes: Sequence[str],
    words: metrics.Words | None = None,
) -> Callable[[str], float]:
    """The best score that an answer has against any of the references.

    words: how a text of a language without spaces is cut.
    """
    metric = _metrics(words)[dataset.metric]

    def score(answer: str) -> float:
        if dataset.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        return max(metric(answer, reference, classes) for reference in answers)

    return score


def _metrics(words: metrics.Words | None) -> dict[str, Metric]:
    cut = words or metrics.english_words
    pieces = words or str.split
    return {
        "f1": lambda answer, reference, _: metrics.f1(answer, reference, cut),
        "rouge": lambda answer, reference, _: metrics.rouge_l(answer, reference, pieces),
        "class": metrics.class_accuracy,
        "count": lambda answer, reference, _: metrics.number_accuracy(answer, reference),
        "paragraph": lambda answer, reference, _: metrics.paragraph_accuracy(answer, reference),
        "edit": lambda answer, reference, _: metrics.edit_similarity(answer, reference),
    }


def chinese_words() -> metrics.Words:
    """Cuts Chinese into words as the benchmark does. Raises ConfigError if jieba is missing."""
    try:
        cut_text: Callable[[str], Iterable[str]] = import_module("jieba").cut
    except ImportError as error:
        raise ConfigError(
            "Chinese sets are scored by words that jieba finds; 'pip install jieba', or leave "
            "them out with --datasets"
        ) from error

    def cut(text: str) -> list[str]:
        words = ("".join(c for c in word.lower() if c.isalnum()) for word in cut_text(text))
        return [word for word in words if word]

    return cut
