"""Serves the tracing page of one store on loopback."""

import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from kvmesh.services.common.errors import ConfigError
from kvmesh.services.traces.web import trace_app

LOOPBACK = "127.0.0.1"


async def serve_page(store: Path, port: int, started: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM. started: called with the URL when it listens.

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
        await uvicorn.Server(config).serve(sockets=[listener])
