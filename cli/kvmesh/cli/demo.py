"""`kvmesh demo`: a whole mesh on this machine for one minute, and what it is good for.

A document hides some facts; two questions are asked about it. The answers cannot be guessed, and
the second question finds the document in the cache. In a terminal the mesh then goes on serving.
"""

import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.errors import FAILED
from kvmesh.cli.generate import stream, tokens_per_s
from kvmesh.cli.options import Json, command
from kvmesh.cli.render import console, milliseconds, print_json, print_table
from kvmesh.cli.trace import print_waterfall, settled
from kvmesh.cli.up import show_progress

if TYPE_CHECKING:
    from kvmesh.client import Answer, AsyncClient
    from kvmesh.integration.launch import Mesh
    from kvmesh.services.common.config import MeshConfig
    from kvmesh.services.traces.tree import Row
    from kvmesh.v1 import inference_pb2

NUM_FACTS = 4
READY_S = 180.0
SETTLE_S = 2.0  # longer than a span waits to be sent, and to be written
SPANS_S = 15.0

Tokens = Annotated[int, typer.Option(min=256, max=4096, help="Length of the document.")]
Keep = Annotated[
    bool | None,
    typer.Option(
        "--keep/--no-keep",
        help="Go on serving until Ctrl-C, or end. In a terminal it goes on.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 40) - 1, help="Another document.")]
# A seed of the evaluation, so the model never saw this document in training.
DEMO_SEED = 7


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt about the document, and the only right answer."""

    prompt: str
    question: str
    expected: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One question as it was answered. Seconds are measured by the router."""

    question: str
    expected: str
    answer: str
    right: bool
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    tokens_per_s: float
    trace_id: str


@command
async def demo(
    tokens: Tokens = 1024, seed: Seed = DEMO_SEED, keep: Keep = None, json: Json = False
) -> None:
    """Start a mesh, ask it two questions about a document, and show where the time went."""
    import tempfile

    from kvmesh.integration.launch import running_mesh
    from kvmesh.integration.launch_state import traces_path
    from kvmesh.services.common.config import MeshConfig, RouterConfig

    config = MeshConfig(router=RouterConfig(port=0))
    questions = make_questions(seed, tokens, token_counter(config.model))
    stays = sys.stdin.isatty() and sys.stdout.isatty() if keep is None else keep
    stays = stays and not json
    ok = False
    with tempfile.TemporaryDirectory(prefix="kvmesh-demo-") as folder:
        store = traces_path(Path(folder))
        async with running_mesh(config, Path(folder)) as mesh:
            turns = await _in_mesh(mesh, questions, json)
            if stays:
                ok = _report(turns, await _settled_rows(store, turns[0].trace_id), json)
                await _keep_serving(mesh, store)
        if not stays:
            # Read when the members have ended, and so have written their last spans.
            ok = _report(turns, _rows(store, turns[0].trace_id), json)
    if not stays and not json:
        _what_next(config)
    if not ok:
        raise typer.Exit(FAILED)


async def _in_mesh(mesh: "Mesh", questions: list[Question], quiet: bool) -> list[Turn]:
    from kvmesh.client import AsyncClient

    async with show_progress(mesh):
        await mesh.wait_ready(READY_S)
    async with AsyncClient(mesh.public_address, mesh.security) as client:
        if not quiet:
            console().print(
                f"[bold]{len(mesh.pids)} processes[/bold] serve "
                f"{mesh.config.model.name} at {mesh.public_address} (gRPC) and "
                f"{mesh.http_url}/v1 (OpenAI's API)\n"
            )
        return [await _ask(client, question, quiet) for question in questions]


def _report(turns: list[Turn], rows: "list[Row]", json: bool) -> bool:
    """Whether all went as it should."""
    hit = turns[1].cached_tokens * 2 >= turns[1].prompt_tokens
    ok = hit and all(turn.right for turn in turns)
    if json:
        spans = [asdict(row) for row in rows]
        print_json({"ok": ok, "turns": [asdict(turn) for turn in turns], "trace": spans})
    else:
        _summary(turns, rows, hit)
    return ok


def _rows(store: Path, trace_id: str) -> "list[Row]":
    from kvmesh.services.traces.reader import SpanReader
    from kvmesh.services.traces.tree import waterfall

    with SpanReader(store) as reader:
        return waterfall(reader.spans(trace_id))


async def _settled_rows(store: Path, trace_id: str) -> "list[Row]":
    """Once no more spans have come for a while: the processes still run, and send theirs late."""
    import asyncio

    await asyncio.to_thread(settled, lambda: len(_rows(store, trace_id)), SETTLE_S, SPANS_S)
    return _rows(store, trace_id)


async def _keep_serving(mesh: "Mesh", store: Path) -> None:
    """The mesh and the page of its traces, until Ctrl-C."""
    import asyncio

    from kvmesh.cli.trace_ui import DEFAULT_PORT
    from kvmesh.integration.trace_page import serve_page
    from kvmesh.services.common.errors import ConfigError

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def started(url: str) -> None:
        console().print(
            f"\nstill serving, until Ctrl-C:\n  traces  [bold]{url}[/bold]\n"
            f"  edge    [bold]{mesh.http_url}/v1[/bold] (OpenAI's API)\n"
            f"  mesh    [bold]{mesh.public_address}[/bold] (gRPC)"
        )

    try:
        await serve_page(store, DEFAULT_PORT, started, stop)
    except ConfigError:  # somebody looks at another mesh's traces there
        await serve_page(store, 0, started, stop)


def _what_next(config: "MeshConfig") -> None:
    from kvmesh.cli.trace_ui import DEFAULT_PORT
    from kvmesh.services.gateway.transport import DEFAULT_PORT as HTTP_PORT

    console().print(
        "\nthe demo's mesh has ended; one that stays:\n"
        f"  kvmesh up --detach   the edge, http://{config.host}:{HTTP_PORT}/v1 (OpenAI's API)\n"
        f"  kvmesh trace ui      its traces, http://127.0.0.1:{DEFAULT_PORT}/"
    )


async def _ask(client: "AsyncClient", question: Question, quiet: bool) -> Turn:
    if not quiet:
        console().print(f"[bold]{question.question}[/bold]")
    answer = await stream(client, _request(question.prompt), None if quiet else sys.stdout)
    turn = _turn(question, answer)
    if not quiet:
        mark = "[green]right[/green]" if turn.right else "[red]wrong[/red]"
        console().print(f"\n{mark}, expected: {turn.expected}\n")
    return turn


def _request(prompt: str) -> "inference_pb2.GenerateRequest":
    from kvmesh.v1 import inference_pb2

    request = inference_pb2.GenerateRequest()
    request.chat.messages.add(role="user", content=prompt)
    request.sampling.max_tokens = 32
    return request


def _turn(question: Question, answer: "Answer") -> Turn:
    usage = answer.usage
    return Turn(
        question=question.question,
        expected=question.expected,
        answer=answer.text,
        right=answer.text.strip() == question.expected,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        cached_tokens=usage.cached_tokens if usage else 0,
        ttft_s=usage.ttft_s if usage else 0.0,
        tokens_per_s=tokens_per_s(usage) if usage else 0.0,
        trace_id=answer.trace_id,
    )


def _summary(turns: list[Turn], rows: "list[Row]", hit: bool) -> None:
    print_table(
        "",
        ("question", ">prompt tokens", ">cached", ">TTFT", ">tokens/s", "answer"),
        [
            (
                ("first", "second")[index],
                turn.prompt_tokens,
                turn.cached_tokens,
                milliseconds(turn.ttft_s),
                f"{turn.tokens_per_s:.1f}",
                "right" if turn.right else "wrong",
            )
            for index, turn in enumerate(turns)
        ],
    )
    out = console()
    if not hit:
        out.print("\n[red]the second question did not find the document in the cache[/red]")
    out.print("\nwhere the first one's time went:")
    print_waterfall(rows)


def make_questions(
    seed: int, num_tokens: int, count_tokens: Callable[[str], int]
) -> list[Question]:
    """Two questions about one document of about `num_tokens`; the same for the same arguments."""
    import random

    from kvmesh.integration import needle

    rng = random.Random(f"demo/{seed}")
    facts = needle.make_facts(rng, NUM_FACTS)
    sentences = [needle.fact_sentence(rng, fact) for fact in facts]
    filler: list[str] = []
    total = count_tokens(" ".join(sentences))
    while total < num_tokens:
        filler.append(needle.filler_sentence(rng))
        total += count_tokens(" " + filler[-1])
    document = needle.scatter(rng, filler, sentences)
    questions = ((fact, needle.question_for(rng, fact)) for fact in rng.sample(facts, 2))
    return [
        Question(needle.join_prompt(document, question), question, fact.value)
        for fact, question in questions
    ]


def token_counter(model: Any) -> Callable[[str], int]:
    """Counts tokens with the model's own tokenizer."""
    from tokenizers import Tokenizer

    from kvmesh.services.common.checkpoint import checkpoint_path

    tokenizer = Tokenizer.from_file(str(checkpoint_path(model) / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text).ids)
