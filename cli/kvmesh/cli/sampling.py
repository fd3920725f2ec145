"""The options of a request: how the next token is chosen, and what the prompt is."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from kvmesh.cli.errors import USAGE, CommandFailed

if TYPE_CHECKING:
    from kvmesh.v1 import common_pb2, inference_pb2


@dataclass(frozen=True)
class Sampling:
    """One option per field; an option that is not given is left to the mesh."""

    max_tokens: Annotated[int | None, Option("--max-tokens", "-n", min=1)] = None
    temperature: Annotated[
        float | None, Option("--temperature", "-t", min=0, help="0 is greedy.")
    ] = None
    top_p: Annotated[float | None, Option(min=0, max=1)] = None
    top_k: Annotated[int, Option(min=0, help="0: all.")] = 0
    min_p: Annotated[float, Option(min=0, max=1)] = 0.0
    seed: Annotated[int | None, Option(min=0, help="Same seed, same text.")] = None
    stop: Annotated[list[str] | None, Option(help="Ends the text; may be repeated.")] = None
    repetition_penalty: Annotated[float | None, Option()] = None
    presence_penalty: Annotated[float, Option(min=-2, max=2)] = 0.0
    frequency_penalty: Annotated[float, Option(min=-2, max=2)] = 0.0
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Go on past the end token.")] = False

    def params(self) -> "common_pb2.SamplingParams":
        from kvmesh.v1 import common_pb2

        return common_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop or (),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            ignore_eos=self.ignore_eos,
        )


@dataclass(frozen=True)
class Prompt:
    """What the request says; the text itself is an argument of the command."""

    file: Annotated[
        Path | None, Option("--file", "-f", help="Read the prompt from a file.", dir_okay=False)
    ] = None
    chat: Annotated[
        bool, Option("--chat/--raw", help="Through the chat template, or the text as it is.")
    ] = True
    system: Annotated[str | None, Option(help="A system message before the prompt.")] = None
    model: Annotated[str, Option(help="Needed only if the mesh serves several.")] = ""
    cache_salt: Annotated[
        str, Option(help="Requests of another salt never share cached blocks.")
    ] = ""


def read_prompt(text: str | None, file: Path | None) -> str:
    """The argument, the file, or what is piped in. Raises CommandFailed (2) if there is none."""
    if text is not None and file is not None:
        raise CommandFailed("give the prompt as an argument or as --file, not both", USAGE)
    prompt = _file_text(file) if file is not None else _argument_or_stdin(text)
    if not prompt.strip():
        raise CommandFailed("the prompt is empty", USAGE)
    return prompt


def _file_text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandFailed(f"cannot read {file}: {error}", USAGE) from error


def _argument_or_stdin(text: str | None) -> str:
    if text is not None and text != "-":
        return text
    if sys.stdin.isatty():
        raise CommandFailed("no prompt; give it as an argument, by --file, or on stdin", USAGE)
    return sys.stdin.read()


def build_request(text: str, prompt: Prompt, sampling: Sampling) -> "inference_pb2.GenerateRequest":
    from kvmesh.v1 import inference_pb2

    request = inference_pb2.GenerateRequest(
        model=prompt.model, sampling=sampling.params(), cache_salt=prompt.cache_salt
    )
    if not prompt.chat:
        if prompt.system:
            raise CommandFailed("--system needs --chat: raw text has no roles", USAGE)
        request.text = text
        return request
    if prompt.system:
        request.chat.messages.add(role="system", content=prompt.system)
    request.chat.messages.add(role="user", content=text)
    return request
