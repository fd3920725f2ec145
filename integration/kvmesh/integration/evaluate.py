"""Answer quality through the whole mesh: questions, answers, scores. What is asked comes from
needle, ruler and longbench; here it is run, and counted."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvmesh.integration.launch import running_mesh
from kvmesh.integration.loadgen import RequestResult, chat_request, closed_loop
from kvmesh.integration.metrics import exact_match
from kvmesh.integration.needle import MAX_FACTS, make_case
from kvmesh.integration.paired import Difference, paired_difference
from kvmesh.services.common.client import Link
from kvmesh.services.common.config import (
    MeshConfig,
    ModelConfig,
    RouterConfig,
    WorkerConfig,
)
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import common_pb2, inference_pb2

CONCURRENCY = 8
NEEDLE_TOKENS = 24  # the longest answer is a name of a few tokens and the end token

CountTokens = Callable[[str], int]
OnDone = Callable[[RequestResult], None]


@dataclass(frozen=True, slots=True)
class EvalCase:
    """One question. group: what its score is averaged within, such as (task, length).

    score: of an answer, 0..1. chat: whether the prompt is a user message, or bare text.
    """

    group: tuple[str, ...]
    prompt: str
    score: Callable[[str], float]
    max_tokens: int
    chat: bool = True


@dataclass(slots=True)
class Score:
    """The mean score of one group under one codec; a request that failed counts as 0.

    answers: the score of each case, in the order in which they were asked.
    """

    codec: str
    group: tuple[str, ...]
    errors: int = 0
    answers: list[float] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return len(self.answers)

    @property
    def total(self) -> float:
        return sum(self.answers, 0.0)

    @property
    def mean(self) -> float:
        return self.total / self.cases if self.cases else 0.0

    def add(self, score: float, failed: bool) -> None:
        self.errors += failed
        self.answers.append(score)

    def as_json(self) -> dict[str, Any]:
        sums = {"cases": self.cases, "total": self.total, "mean": round(self.mean, 4)}
        return {**asdict(self), **sums}


@dataclass(frozen=True, slots=True)
class NeedlePlan:
    """Which documents: `cases` of each length, spread evenly over the depths, each document with
    1 to MAX_FACTS facts in turn."""

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    cases: int = 200
    seed: int = 20_000


def needle_cases(plan: NeedlePlan, count: CountTokens) -> list[EvalCase]:
    """Groups are (length, depth). Raises ValueError for a length or depth out of range."""
    made = []
    for length in plan.lengths:
        for number in range(plan.cases):
            depth = plan.depths[number % len(plan.depths)]
            facts = number // len(plan.depths) % MAX_FACTS + 1
            case = make_case(plan.seed + number, length, facts, count, depth)
            group = (str(length), f"{depth:.0%}")
            made.append(EvalCase(group, case.prompt, exact_match(case.answer), NEEDLE_TOKENS))
    return made


async def evaluate(
    model: ModelConfig, cases: Sequence[EvalCase], on_done: OnDone | None = None
) -> list[RequestResult]:
    """Starts a mesh of two workers, asks every question greedily, and stops it.

    Raises ConfigError or MeshFailed if it cannot start.
    """
    workers = (WorkerConfig(role="both", count=2),)
    config = MeshConfig(model=model, workers=workers, router=RouterConfig(port=0))
    with tempfile.TemporaryDirectory(prefix="kvmesh-eval-") as folder:
        async with running_mesh(config, Path(folder)) as mesh:
            await mesh.wait_ready()
            async with Link(mesh.public_address, mesh.security) as link:
                return await ask_all(InferenceClient(link), cases, on_done)


async def ask_all(
    client: InferenceClient, cases: Sequence[EvalCase], on_done: OnDone | None = None
) -> list[RequestResult]:
    return await closed_loop(client, [_request(case) for case in cases], CONCURRENCY, on_done)


def _request(case: EvalCase) -> inference_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=case.max_tokens)
    if case.chat:
        return chat_request(case.prompt, sampling)
    return inference_pb2.GenerateRequest(text=case.prompt, sampling=sampling)


def score_all(
    codec: str, cases: Iterable[EvalCase], results: Iterable[RequestResult]
) -> list[Score]:
    """One score per group, in the order of their first cases."""
    scores: dict[tuple[str, ...], Score] = {}
    for case, result in zip(cases, results, strict=True):
        score = scores.setdefault(case.group, Score(codec, case.group))
        score.add(0.0 if result.error else case.score(result.text), bool(result.error))
    return list(scores.values())


def merged(scores: Iterable[Score], axis: int) -> list[Score]:
    """Scores over groups that agree in one part, such as all depths of a length."""
    sums: dict[tuple[str, str], Score] = {}
    for score in scores:
        part = score.group[axis]
        into = sums.setdefault((score.codec, part), Score(score.codec, (part,)))
        into.errors += score.errors
        into.answers += score.answers
    return list(sums.values())


def differences(scores: Iterable[Score]) -> dict[str, Difference]:
    """Of every codec but the first to the first, over all their cases, which must be the same.

    Raises ValueError for scores between right and wrong.
    """
    answers: dict[str, list[float]] = {}
    for score in scores:
        answers.setdefault(score.codec, []).extend(score.answers)
    first, *others = answers.items()
    return {codec: paired_difference(first[1], own) for codec, own in others}
