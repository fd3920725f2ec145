"""Serves the tracing page of one store on loopback."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from kvmesh.services.common.errors import ConfigError
from kvmesh.services.traces.web import trace_app

LOOPBACK = "127.0.0.1"


class _Server(uvicorn.Server):
    """Signals are the business of who runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_page(
    store: Path, port: int, started: Callable[[str], None], stop: asyncio.Event | None = None
) -> None:
    """Until `stop`, or without one until SIGINT or SIGTERM.

    started: called with the URL when it listens.

    Raises ConfigError if the port is taken.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {LOOPBACK}:{port}: {error.strerror}; give another --port, or 0"
            ) from error
        listener.listen(64)
        config = uvicorn.Config(trace_app(store), log_level="warning", lifespan="off")
        started(f"http://{LOOPBACK}:{listener.getsockname()[1]}/")
        if stop is None:
            await uvicorn.Server(config).serve(sockets=[listener])
            return
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await stop.wait()
        server.should_exit = True
        await task
