"""`kvmesh chat`: a conversation; each turn sends the whole history, which the mesh has cached."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.connect import open_client
from kvmesh.cli.generate import stats_line, stream
from kvmesh.cli.options import Target, command
from kvmesh.cli.render import console
from kvmesh.cli.sampling import Sampling

if TYPE_CHECKING:
    from kvmesh.client import AsyncClient
    from kvmesh.v1 import inference_pb2

System = Annotated[str | None, typer.Option(help="A system message before the conversation.")]
Model = Annotated[str, typer.Option(help="Needed only if the mesh serves several.")]

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


@command
async def chat(
    target: Target, sampling: Sampling, system: System = None, model: Model = ""
) -> None:
    """Talk with a model."""
    from kvmesh.v1 import inference_pb2

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines and keeps a history

    first = [inference_pb2.ChatMessage(role="system", content=system)] if system else []
    history = list(first)
    notes = console(stderr=True)
    async with open_client(target) as client:
        notes.print(HELP, style="dim", markup=False, soft_wrap=True)
        while (line := await _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                history = list(first)
                notes.print("forgotten", style="dim")
            elif line:
                history.append(inference_pb2.ChatMessage(role="user", content=line))
                request = inference_pb2.GenerateRequest(model=model, sampling=sampling.params())
                request.chat.messages.extend(history)
                history += await _turn(client, request)


async def _turn(
    client: "AsyncClient", request: "inference_pb2.GenerateRequest"
) -> list["inference_pb2.ChatMessage"]:
    """Streams the answer; the message to remember it by. Ctrl-C ends the answer only."""
    import asyncio
    import signal

    from kvmesh.cli.errors import report
    from kvmesh.v1 import inference_pb2

    loop = asyncio.get_running_loop()
    answering = asyncio.ensure_future(stream(client, request, sys.stdout))
    loop.add_signal_handler(signal.SIGINT, answering.cancel)
    try:
        answer = await answering
    except asyncio.CancelledError:
        sys.stdout.write(" [stopped]\n")
        return []
    except Exception as error:
        report(error)
        return []
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    sys.stdout.write("\n")
    console(stderr=True).print(stats_line(answer), style="dim", markup=False, soft_wrap=True)
    return [inference_pb2.ChatMessage(role="assistant", content=answer.text)]


async def _read_line() -> str | None:
    """A line from the terminal or a pipe; None at its end. The connection stays alive meanwhile."""
    import asyncio

    prompt = "> " if sys.stdin.isatty() else ""
    try:
        return (await asyncio.to_thread(input, prompt)).strip()
    except EOFError:
        return None
