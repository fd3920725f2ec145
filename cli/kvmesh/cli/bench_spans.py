"""`kvmesh bench spans`: how much the trace receiver takes."""

from typing import Annotated

import typer

from kvmesh.cli.options import Json, command
from kvmesh.cli.render import console, print_json, size

NumSpans = Annotated[int, typer.Option("--spans", min=512, help="How many to send.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; the median one is shown.")]


@command
async def spans(num_spans: NumSpans = 100_000, rounds: Rounds = 3, json: Json = False) -> None:
    """Spans/s through OTLP into the store, and the receiver's memory."""
    import tempfile
    from dataclasses import asdict
    from pathlib import Path

    from kvmesh.integration.bench_spans import bench_spans
    from kvmesh.integration.machine import describe_machine

    results = []
    with console(stderr=True).status("sending spans"):
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="kvmesh-bench-") as folder:
                results.append(await bench_spans(num_spans, Path(folder)))
    result = sorted(results, key=lambda r: r.spans_per_s)[len(results) // 2]
    if json:
        print_json({"machine": describe_machine(), "rounds": rounds, **asdict(result)})
        return
    memory = size(result.peak_rss_bytes) if result.peak_rss_bytes is not None else "unknown"
    console().print(
        f"{result.spans_per_s:,.0f} spans/s into the store ({result.spans:,} in "
        f"{result.seconds:.1f} s), receiver at most {memory}"
    )
