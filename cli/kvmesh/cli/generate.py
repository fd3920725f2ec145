"""`kvmesh generate`: one request, its text as it comes, and what it cost."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from kvmesh.cli.connect import open_client
from kvmesh.cli.options import Json, Target, command
from kvmesh.cli.render import console, milliseconds, plain, print_json
from kvmesh.cli.sampling import Prompt, Sampling, build_request, read_prompt

if TYPE_CHECKING:
    from kvmesh.services.router.client import InferenceClient
    from kvmesh.v1 import inference_pb2

Text = Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="'-' or nothing: read stdin.")]


@dataclass
class Answer:
    """A request's responses, added up. finish_reason: stop, length ..."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    request_id: str = ""
    trace_id: str = ""
    usage: "inference_pb2.Usage | None" = None

    def add(self, response: "inference_pb2.GenerateResponse") -> None:
        from kvmesh.v1 import common_pb2

        self.text += response.text
        self.token_ids += response.token_ids
        self.request_id = response.request_id or self.request_id
        self.trace_id = response.trace_id or self.trace_id
        if response.finish_reason:
            name = common_pb2.FinishReason.Name(response.finish_reason)
            self.finish_reason = name.removeprefix("FINISH_REASON_").lower()
            self.usage = response.usage

    def record(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "usage": plain(self.usage) if self.usage is not None else None,
        }


async def stream(
    client: "InferenceClient",
    request: "inference_pb2.GenerateRequest",
    out: TextIO | None = None,
) -> Answer:
    """Runs a request to its end; its text goes to `out` as it comes."""
    answer = Answer()
    async for response in client.generate(request):
        answer.add(response)
        if out is not None:
            out.write(response.text)
            out.flush()
    return answer


def tokens_per_s(usage: "inference_pb2.Usage") -> float:
    """Of the decode: tokens after the first by the time after it; 0 if there was only one."""
    seconds = usage.duration_s - usage.ttft_s
    return (usage.completion_tokens - 1) / seconds if seconds > 0 else 0.0


def stats_line(answer: Answer) -> str:
    usage = answer.usage
    if usage is None:
        return f"no end was reported; trace {answer.trace_id}"
    parts = [
        f"{usage.completion_tokens} tokens ({answer.finish_reason})",
        f"TTFT {milliseconds(usage.ttft_s)}",
        f"{tokens_per_s(usage):.1f} tokens/s",
        f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached",
        " -> ".join(name for name in (usage.prefill_worker, usage.decode_worker) if name),
        f"{usage.migrations} migrations" if usage.migrations else "",
        f"seed {usage.seed}",
        f"trace {answer.trace_id}",
    ]
    return ", ".join(part for part in parts if part)


@command
async def generate(
    target: Target,
    prompt: Prompt,
    sampling: Sampling,
    text: Text = None,
    json: Json = False,
) -> None:
    """Answer one prompt; text on stdout, figures on stderr."""
    request = build_request(read_prompt(text, prompt.file), prompt, sampling)
    request.echo_token_ids = json
    async with open_client(target) as client:
        answer = await stream(client, request, None if json else sys.stdout)
    if json:
        print_json(answer.record())
        return
    sys.stdout.write("\n")
    console(stderr=True).print(stats_line(answer), style="dim", markup=False, soft_wrap=True)
