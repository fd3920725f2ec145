"""One member's own process: what `kvmesh serve` runs, and how it hangs on its launcher.

The launcher hands down one end of a socket. The member tells its addresses through it, one JSON
line each: {"metrics": [...]} where it shows its metrics, {"bound": [...]} when it listens,
{"ready": [...]} when it serves. When the socket closes, the launcher is gone and the member ends;
on Linux the kernel sees to that as well.
"""

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kvmesh.integration.launch_plan import TRACES, metrics_port
from kvmesh.services.common.config import MeshConfig
from kvmesh.services.common.errors import ConfigError
from kvmesh.services.common.metrics import Meters
from kvmesh.services.common.process import METRICS_PORT_VARIABLE, ProcessContext, listen_port
from kvmesh.services.common.security import Security, load_security
from kvmesh.services.common.server import Service, serve
from kvmesh.services.common.telemetry import Telemetry, senders

ORPHAN_GRACE_S = 3.0  # to drain after the launcher has gone, where the kernel has not killed us
PR_SET_PDEATHSIG = 1

_SERVICES = {
    "router": ("kvmesh.services.router.service", "RouterService"),
    "tokenizer": ("kvmesh.services.tokenizer.service", "TokenizerService"),
    "kvcache": ("kvmesh.services.kvcache.service", "KvCacheService"),
    "worker": ("kvmesh.services.worker.service", "WorkerService"),
    "gateway": ("kvmesh.services.gateway.service", "GatewayService"),
}
TRACES_NICE = 5  # requests come first


@dataclass(frozen=True, slots=True)
class MemberJob:
    """What one process is to be. run_dir: where the trace receiver has its store.

    mesh_address: the router's; empty for the router itself.
    """

    member_id: str
    config: MeshConfig
    mesh_address: str
    run_dir: Path | None

    @property
    def kind(self) -> str:
        return self.member_id.partition("-")[0]


class LauncherTie:
    """The member's end of the launcher's socket. Without one it tells and watches nobody."""

    def __init__(self, fd: int | None) -> None:
        self._socket = socket.socket(fileno=fd) if fd is not None else None
        if self._socket is not None:
            self._socket.set_inheritable(False)
            threading.Thread(target=self._watch, name="launcher-watch", daemon=True).start()

    def tell(self, word: str, addresses: Sequence[str]) -> None:
        if self._socket is not None:
            self._socket.sendall(json.dumps({word: list(addresses)}).encode() + b"\n")

    def _watch(self) -> None:
        """Ends this process when the launcher has gone, however that came."""
        try:
            while self._socket is not None and self._socket.recv(1024):
                pass
        except OSError:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies; a no-op where it cannot.

    `parent` is the launcher's pid: if it has gone already, this process ends at once.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def run_member(job: MemberJob, tie: LauncherTie) -> None:
    """Serves until SIGTERM. Raises ConfigError if it cannot start as configured."""
    logging.basicConfig(
        stream=sys.stderr,
        level=job.config.telemetry.log_level,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    files = job.config.security
    security = load_security(files.cert, files.key, files.ca, files.token_file, files.keys_file)
    if job.kind == TRACES:
        _run_traces(job, tie, security)
        return
    telemetry = Telemetry(
        job.kind, job.member_id, senders(job.config.telemetry.otlp, security.token or "")
    )
    meters = Meters(job.kind, job.member_id)
    try:
        context = ProcessContext(
            job.config, job.member_id, job.mesh_address, security, telemetry, meters=meters
        )
        if job.config.telemetry.metrics:
            port = listen_port(metrics_port(job.config, job.member_id), METRICS_PORT_VARIABLE)
            tie.tell("metrics", (meters.serve(port),))
        _serve(create_service(context, job.kind), security, tie)
    finally:
        meters.close()
        telemetry.close()


def _run_traces(job: MemberJob, tie: LauncherTie, security: Security) -> None:
    """On loopback without TLS, whatever the mesh has; its token is asked for all the same."""
    from kvmesh.services.traces.service import TracesService

    if job.run_dir is None:
        raise ConfigError("the trace receiver needs --run-dir, where it keeps its store")
    os.nice(TRACES_NICE)
    service = TracesService(job.config.telemetry, job.run_dir)
    _serve(service, Security(token=security.token), tie)


def _serve(service: Service, security: Security, tie: LauncherTie) -> None:
    _run(
        serve(
            service,
            security,
            on_ready=lambda addresses: tie.tell("ready", addresses),
            on_bound=lambda addresses: tie.tell("bound", addresses),
        )
    )


def create_service(context: ProcessContext, kind: str) -> Service:
    """Imports only what this kind needs: a router must not load kernels."""
    if kind not in _SERVICES:
        known = ", ".join(_SERVICES)
        raise ConfigError(f"member id {context.member_id!r} has no known kind; kinds: {known}")
    module, name = _SERVICES[kind]
    service: Service = getattr(import_module(module), name)(context)
    return service


def _run(main: Any) -> None:
    try:
        import uvloop
    except ImportError:
        import asyncio

        asyncio.run(main)
    else:
        uvloop.run(main)
