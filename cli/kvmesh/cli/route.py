"""`kvmesh route`: where a request would run, and why."""

from typing import TYPE_CHECKING

from kvmesh.cli.connect import open_client
from kvmesh.cli.generate import Text
from kvmesh.cli.options import Json, Target, command
from kvmesh.cli.render import console, milliseconds, plain, print_json, print_table
from kvmesh.cli.sampling import Prompt, Sampling, build_request, read_prompt

if TYPE_CHECKING:
    from kvmesh.v1 import inference_pb2


@command
async def route(
    target: Target,
    prompt: Prompt,
    sampling: Sampling,
    text: Text = None,
    json: Json = False,
) -> None:
    """Explain where a prompt would run, without running it."""
    request = build_request(read_prompt(text, prompt.file), prompt, sampling)
    async with open_client(target) as client:
        reply = await client.route(request)
    if json:
        print_json(plain(reply))
        return
    columns: tuple[str, ...] = (
        "",
        "prefill",
        "decode",
        ">total",
        ">queue",
        ">prefill",
        ">transfer",
        ">decode",
    )
    columns += (">cached here", ">on shards", ">to compute", "")
    print_table("", columns, [_row(candidate) for candidate in reply.candidates])
    console().print(
        f"\n{reply.prompt_tokens} prompt tokens in {reply.prompt_blocks} blocks; {reply.reason}",
        markup=False,
    )


def _row(candidate: "inference_pb2.Candidate") -> tuple[object, ...]:
    terms = (
        candidate.total_s,
        candidate.queue_s,
        candidate.prefill_s,
        candidate.transfer_s,
        candidate.decode_s,
    )
    # A candidate that was ruled out before it was priced must not look as if it were free.
    priced = any(terms) or not candidate.rejected
    return (
        "*" if candidate.chosen else "",
        candidate.prefill_worker or "-",
        candidate.decode_worker,
        *(milliseconds(term) if priced else "-" for term in terms),
        candidate.local_cached_tokens,
        candidate.remote_cached_tokens,
        candidate.uncached_tokens,
        candidate.rejected or ("chosen" if candidate.chosen else ""),
    )
