"""Answer quality through the whole mesh: fresh documents with facts, and questions about them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tokenizers import Tokenizer

from kvmesh.integration.loadgen import RequestResult, chat_request, closed_loop
from kvmesh.integration.needle import MAX_FACTS, NeedleCase, make_case
from kvmesh.services.router.client import InferenceClient
from kvmesh.v1 import common_pb2

MAX_ANSWER_TOKENS = 24  # the longest answer is a name of a few tokens and the end token


@dataclass(frozen=True, slots=True)
class NeedlePlan:
    """Which documents: `cases` of each length, with 1 to MAX_FACTS facts in turn."""

    lengths: tuple[int, ...] = (256, 512, 1024)
    cases: int = 100
    seed: int = 20_000
    concurrency: int = 8


@dataclass(slots=True)
class NeedleScore:
    """Exact answers at one document length under one codec."""

    codec: str
    length: int
    cases: int = 0
    exact: int = 0
    errors: int = 0
    by_facts: dict[int, tuple[int, int]] = field(default_factory=dict)  # facts -> (exact, cases)

    @property
    def accuracy(self) -> float:
        return self.exact / self.cases if self.cases else 0.0

    def add(self, case: NeedleCase, result: RequestResult) -> None:
        right = int(not result.error and result.text.strip() == case.answer)
        exact, cases = self.by_facts.get(case.num_facts, (0, 0))
        self.by_facts[case.num_facts] = (exact + right, cases + 1)
        self.cases += 1
        self.exact += right
        self.errors += bool(result.error)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "accuracy": round(self.accuracy, 4)}


def needle_cases(plan: NeedlePlan, length: int, tokenizer: Tokenizer) -> list[NeedleCase]:
    """The cases of one length; the same for every codec, so that scores can be compared."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return [make_case(plan.seed + i, length, i % MAX_FACTS + 1, count) for i in range(plan.cases)]


async def score_needles(
    client: InferenceClient,
    codec: str,
    cases: Sequence[NeedleCase],
    concurrency: int,
    on_done: Callable[[RequestResult], None] | None = None,
) -> NeedleScore:
    """Asks every question greedily; an answer counts if it is exactly the expected one."""
    score = NeedleScore(codec, cases[0].target_tokens if cases else 0)
    sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    requests = [chat_request(case.prompt, sampling) for case in cases]
    for case, result in zip(
        cases, await closed_loop(client, requests, concurrency, on_done), strict=True
    ):
        score.add(case, result)
    return score
