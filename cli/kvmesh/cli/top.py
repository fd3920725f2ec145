"""`kvmesh top`: the mesh, live in a terminal."""

from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.connect import metrics_endpoints, open_client
from kvmesh.cli.errors import USAGE, CommandFailed
from kvmesh.cli.options import Json, Target, command
from kvmesh.cli.render import console, print_json

if TYPE_CHECKING:
    from kvmesh.client import AsyncClient
    from kvmesh.integration.top import Look, MeshView

RATE_S = 5.0  # tokens and bytes per second are of so long; latencies are of --window
LOOK_S = 2.0  # a router that takes longer to say how it is counts as away
HISTORY = 60  # tokens/s shown as bars

Once = Annotated[bool, typer.Option("--once", help="Print it once: averages since the start.")]
Interval = Annotated[float, typer.Option(min=0.2, max=60, help="Seconds between looks.")]
Window = Annotated[float, typer.Option(min=5, max=3600, help="Seconds that latencies are of.")]


@command
async def top(
    target: Target,
    once: Once = False,
    interval: Interval = 1.0,
    window: Window = 60.0,
    json: Json = False,
) -> None:
    """Watch workers, shards, queues, tokens/s, TTFT and TPOT; Ctrl-C ends it.

    Latencies, hit rates and shard counters come from the members' metrics, which only the mesh's
    own machine can read: from elsewhere they are shown as '-'.
    """
    from kvmesh.integration.top import mesh_view

    async with open_client(target) as client:
        if once:
            view = mesh_view(await _look(client, target))
            if json:
                print_json(asdict(view))
            else:
                _print(view)
            return
        if json:
            raise CommandFailed("--json needs --once", USAGE)
        if not console().is_terminal:
            raise CommandFailed("the output is no terminal; use --once", USAGE)
        await _watch(client, target, interval, window)


async def _look(client: "AsyncClient", target: Target) -> "Look":
    """Raises MeshError if the router does not answer."""
    import time

    from kvmesh.integration.scrape import scrape
    from kvmesh.integration.top import Look

    status = await client.status(LOOK_S)
    return Look(time.monotonic(), status, await scrape(metrics_endpoints(target)))


async def _watch(client: "AsyncClient", target: Target, interval_s: float, window_s: float) -> None:
    import asyncio

    from rich.live import Live

    from kvmesh.cli.top_view import render
    from kvmesh.integration.top import mesh_view
    from kvmesh.services.common.errors import MeshError

    looks: deque[Look] = deque()
    speeds: deque[float] = deque(maxlen=HISTORY)
    view: MeshView | None = None
    out = console()
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            trouble = ""
            try:
                now = await _look(client, target)
                while looks and looks[0].at < now.at - window_s:
                    looks.popleft()
                recent = next((look for look in looks if look.at >= now.at - RATE_S), None)
                view = mesh_view(now, looks[0] if looks else None, recent)
                looks.append(now)
                speeds.append(view.output_tokens_per_s or 0.0)
            except (MeshError, CommandFailed) as error:
                trouble = str(error)
            live.update(render(view, list(speeds), out.size, trouble), refresh=True)
            await asyncio.sleep(interval_s)


def _print(view: "MeshView") -> None:
    from kvmesh.cli.top_view import tables

    out = console()
    for part in tables(view, out.width):
        out.print(part)
