"""`kvmesh generate`: one request, its text as it comes, and what it cost."""

import sys
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from kvmesh.cli.connect import open_client
from kvmesh.cli.options import Json, Target, command
from kvmesh.cli.render import console, milliseconds, plain, print_json
from kvmesh.cli.sampling import Prompt, Sampling, build_request, read_prompt

if TYPE_CHECKING:
    from kvmesh.client import Answer, AsyncClient
    from kvmesh.v1 import inference_pb2

Text = Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="'-' or nothing: read stdin.")]


def record(answer: "Answer") -> dict[str, Any]:
    """An answer as one JSON document."""
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "request_id": answer.request_id,
        "trace_id": answer.trace_id,
        "usage": plain(answer.usage) if answer.usage is not None else None,
    }


async def stream(
    client: "AsyncClient",
    request: "inference_pb2.GenerateRequest",
    out: TextIO | None = None,
) -> "Answer":
    """Runs a request to its end; its text goes to `out` as it comes."""
    from contextlib import aclosing

    from kvmesh.client import Answer

    answer = Answer()
    async with aclosing(client.stream(request)) as responses:
        async for response in responses:
            answer.add(response)
            if out is not None:
                out.write(response.text)
                out.flush()
    return answer


def tokens_per_s(usage: "inference_pb2.Usage") -> float:
    """Of the decode: tokens after the first by the time after it; 0 if there was only one."""
    seconds = usage.duration_s - usage.ttft_s
    return (usage.completion_tokens - 1) / seconds if seconds > 0 else 0.0


def cost_parts(usage: "inference_pb2.Usage") -> list[str]:
    """What the request took of devices, with the clock and the price that it rests on."""
    if usage.cost_kind == "simulated":
        ttft = milliseconds(usage.simulated_ttft_s)
        total = milliseconds(usage.simulated_duration_s)
        clocks = [f"simulated TTFT {ttft} and duration {total}"]
    else:
        clocks = []
    if usage.cost_kind not in ("measured", "simulated"):
        return ["device time both measured and simulated"] if usage.cost_kind else []
    used = f"{usage.device_s:.3g} device seconds"
    if usage.HasField("cost_split"):
        prices = sorted({stay.price_usd_h for stay in usage.devices})
        told = ", ".join(f"{price:g}" for price in prices)
        used += f" = ${usage.cost_usd:.3g} at ${told}/h"
    return [*clocks, f"{used} ({usage.cost_kind})"]


def stats_line(answer: "Answer") -> str:
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
        *cost_parts(usage),
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
        print_json(record(answer))
        return
    sys.stdout.write("\n")
    console(stderr=True).print(stats_line(answer), style="dim", markup=False, soft_wrap=True)
