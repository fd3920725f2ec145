"""The engine alone, without a mesh around it: what `kvmesh bench mesh` compares with.

Runs as its own process, so that both sides have the same machine: `python -m
kvmesh.integration.bare CONFIG.json` reads one JSON round per line, runs it, and writes one line.
The engine, its scheduler, sampler and model are the worker's own; only gRPC, routing and text are
left out.
"""

import queue
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from kvmesh.backends.base import Model
from kvmesh.kernels.layout import BLOCK_SIZE
from kvmesh.services.common.config import MeshConfig, WorkerConfig
from kvmesh.services.common.sampling import SamplingSettings
from kvmesh.services.kvcache.keys import root_key
from kvmesh.services.worker.engine import Engine
from kvmesh.services.worker.outcome import Outcome
from kvmesh.services.worker.sequence import Work
from kvmesh.services.worker.service import limits_of, open_configured


@dataclass(frozen=True)
class Round:
    """Greedy requests, run `concurrency` at a time to exactly `output_tokens` each."""

    prompts: list[list[int]]
    output_tokens: int
    concurrency: int
    salt: str  # prompts of another salt share no blocks


@dataclass(frozen=True)
class RoundResult:
    """Seconds from the start of the round, and of each request from its submission."""

    seconds: float
    output_tokens: int
    ttft_s: list[float]
    duration_s: list[float]


READ_ROUND = TypeAdapter(Round)
READ_RESULT = TypeAdapter(RoundResult)


class BareEngine:
    """An engine whose outcomes come back in a queue."""

    def __init__(self, model: Model, worker: WorkerConfig) -> None:
        self._model = model
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        limits = limits_of(worker, model)
        self._engine = Engine(model, limits, self._outcomes.put, time.perf_counter)
        self._engine.start()
        self._tickets = 0

    def close(self) -> None:
        self._engine.stop()
        self._model.close()

    def run(self, asked: Round) -> RoundResult:
        begin = time.perf_counter()
        submitted: dict[int, float] = {}
        ttft: list[float] = []
        durations: list[float] = []
        waiting = list(reversed(asked.prompts))
        tokens = 0
        while len(durations) < len(asked.prompts):
            while waiting and len(submitted) < asked.concurrency:
                self._submit(waiting.pop(), asked, submitted)
            outcome = self._outcomes.get()
            if outcome.refusals:
                raise RuntimeError(f"the engine refused a request: {outcome.refusals[0][1]}")
            now = time.perf_counter()
            for update in outcome.updates:
                ticket = update.sequence.work.ticket
                tokens += len(update.tokens)
                if update.first:
                    ttft.append(now - submitted[ticket])
                if update.finish is not None:
                    durations.append(now - submitted.pop(ticket))
        return RoundResult(time.perf_counter() - begin, tokens, ttft, durations)

    def _submit(self, prompt: list[int], asked: Round, submitted: dict[int, float]) -> None:
        self._tickets += 1
        layout = self._model.spec.layout
        settings = SamplingSettings(ignore_eos=True, max_tokens=asked.output_tokens)
        submitted[self._tickets] = time.perf_counter()
        self._engine.submit(
            Work(
                ticket=self._tickets,
                request_id=str(self._tickets),
                token_ids=tuple(prompt),
                num_prompt=len(prompt),
                settings=settings,
                root=root_key(layout.fingerprint, layout.codec_label, BLOCK_SIZE, asked.salt),
                eos_token_ids=self._model.spec.eos_token_ids,
            )
        )


def main(arguments: Sequence[str]) -> None:
    config = MeshConfig.model_validate_json(Path(arguments[0]).read_text())
    engine = BareEngine(open_configured(config, config.workers[0]), config.workers[0])
    try:
        print('{"ready": true}', flush=True)
        for line in sys.stdin:
            result = engine.run(READ_ROUND.validate_json(line))
            print(READ_RESULT.dump_json(result).decode(), flush=True)
    finally:
        engine.close()


if __name__ == "__main__":
    main(sys.argv[1:])
