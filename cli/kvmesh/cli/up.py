"""`kvmesh up` and `kvmesh down`: a mesh of processes on this machine."""

import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.errors import INTERRUPTED, CommandFailed, not_running
from kvmesh.cli.options import ConfigFile, RunDir, command
from kvmesh.cli.render import console, print_table
from kvmesh.cli.up_backend import (
    BackendName,
    Device,
    Devices,
    TimedAs,
    Weights,
    simulating,
    with_backend,
)

if TYPE_CHECKING:
    import asyncio
    import subprocess

    from kvmesh.integration.launch import Mesh
    from kvmesh.integration.launch_state import MeshState
    from kvmesh.services.common.config import MeshConfig

POLL_S = 0.1  # between looks at the state file of a mesh in another process

ReadySeconds = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds until the mesh must be ready.")
]
Detach = Annotated[
    bool,
    typer.Option("--detach/--foreground", "-d", help="Go on in the background, or until Ctrl-C."),
]
StopSeconds = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds until what still runs is killed.")
]


@command
def up(
    config: ConfigFile = None,
    backend: BackendName = None,
    device: Device = None,
    devices: Devices = None,
    as_model: TimedAs = None,
    weights: Weights = None,
    run_dir: RunDir = None,
    detach: Detach = False,
    timeout: ReadySeconds = 180.0,
) -> None:
    """Start a mesh on this machine."""
    import asyncio

    from kvmesh.integration.launch_state import resolve_run_dir
    from kvmesh.services.common.codec_choice import choose_codec, find_check
    from kvmesh.services.common.config import load_config

    mesh_config = load_config(config)
    if backend is not None:
        mesh_config = with_backend(mesh_config, backend)
    wanted = {"device": device, "count": devices, "model": as_model, "weights": weights}
    given: dict[str, object] = {name: value for name, value in wanted.items() if value is not None}
    if given:
        mesh_config = simulating(mesh_config, given)
    path = resolve_run_dir(run_dir)
    choice = choose_codec(mesh_config.model, find_check(mesh_config.model))
    if choice.warning:
        console(stderr=True).print(f"[yellow]warning:[/] {choice.warning}")
    if detach:
        options = [] if config is None else ["--config", str(config.absolute())]
        options += [] if backend is None else ["--backend", backend]
        asked = (device, devices, as_model, weights)
        flags = ("--device", "--devices", "--as-model", "--weights")
        for flag, value in zip(flags, asked, strict=True):
            options += [] if value is None else [flag, str(value)]
        _detached(options, path, timeout)
        return
    code = asyncio.run(_foreground(mesh_config, path, timeout))
    if code:
        raise typer.Exit(code)


async def _foreground(config: "MeshConfig", run_dir: Path, timeout_s: float) -> int:
    import asyncio

    from kvmesh.integration.launch import running_mesh

    stop = asyncio.Event()
    interrupted = asyncio.Event()
    async with running_mesh(config, run_dir) as mesh:
        _on_signals(mesh, stop, interrupted)
        ready = asyncio.ensure_future(mesh.wait_ready(timeout_s))
        asked = asyncio.ensure_future(stop.wait())
        async with show_progress(mesh):
            await asyncio.wait({ready, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)
            return INTERRUPTED if interrupted.is_set() else 0
        ready.result()
        print_members(mesh.state())
        console().print("Ctrl-C stops it.")
        await asked
        console(stderr=True).print("stopping; Ctrl-C again kills it at once")
    return 0


def _on_signals(mesh: "Mesh", stop: "asyncio.Event", interrupted: "asyncio.Event") -> None:
    """The first signal asks for an orderly end, a second one ends it now."""
    import asyncio

    def received(number: int) -> None:
        if stop.is_set():
            mesh.kill_all()
        if number == signal.SIGINT:
            interrupted.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, received, number)


@asynccontextmanager
async def show_progress(mesh: "Mesh") -> AsyncIterator[None]:
    """Shows on stderr, while the block runs, which members are ready."""
    import asyncio

    async def follow(starting: _Starting) -> None:
        while True:
            starting.update(mesh.state())
            await asyncio.sleep(POLL_S)

    with _Starting() as starting:
        task = asyncio.create_task(follow(starting))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class _Starting:
    """A bar of the members that are ready, with the names of those that are not."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("starting"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "_Starting":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, state: "MeshState") -> None:
        late = [f"{m.member_id} ({m.phase})" for m in state.members if m.phase != "ready"]
        self._progress.update(
            self._task,
            total=len(state.members),
            completed=len(state.members) - len(late),
            description=", ".join(late) or "waiting for the router's health",
        )


def _detached(options: list[str], run_dir: Path, timeout_s: float) -> None:
    """Starts `kvmesh up --foreground` in a session of its own and waits until it is ready."""
    import subprocess

    from kvmesh.integration.launch_state import last_line, log_path, running_state

    if running_state(run_dir) is not None:
        raise CommandFailed(f"a mesh already runs in {run_dir}; stop it with 'kvmesh down'", 2)
    command_line = [sys.executable, "-m", "kvmesh.cli.main", "up", "--foreground"]
    command_line += ["--run-dir", str(run_dir), "--timeout", str(timeout_s), *options]
    log = log_path(run_dir, "launcher")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            command_line,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        state = _wait_ready(launcher, run_dir, timeout_s)
    except BaseException:
        launcher.terminate()
        launcher.wait()
        raise
    if state is None:
        launcher.wait()
        said = last_line(log).removeprefix("error: ")
        raise CommandFailed(said or f"the launcher ended; see {log}", launcher.returncode or 1)
    launcher.returncode = 0  # it lives on: nothing here waits for its end, nor warns that it runs
    print_members(state)
    console().print("'kvmesh down' stops it.")


def _wait_ready(
    launcher: "subprocess.Popen[bytes]", run_dir: Path, timeout_s: float
) -> "MeshState | None":
    """None if the launcher ended instead, which it does on its own after `timeout_s`."""
    from kvmesh.integration.launch_state import read_state

    with _Starting() as starting:
        while launcher.poll() is None:
            state = read_state(run_dir)
            if state is not None and state.launcher_pid == launcher.pid:
                starting.update(state)
                if state.ready:
                    return state
            time.sleep(POLL_S)
    return None


def print_members(state: "MeshState") -> None:
    print_table(
        "",
        ("member", "kind", "role", "address", ">pid"),
        [(m.member_id, m.kind, m.role, " ".join(m.addresses), m.pid or "") for m in state.members],
    )
    console().print(f"\nready at [bold]{state.public_address}[/bold] (gRPC)")
    if state.http_url:
        console().print(f"OpenAI's API at [bold]{state.http_url}/v1[/bold]")
    if state.oip_address:
        console().print(f"Open Inference Protocol at [bold]{state.oip_address}[/bold] (gRPC)")


@command
def down(run_dir: RunDir = None, timeout: StopSeconds = 60.0) -> None:
    """Stop the mesh of a run directory; requests that run may end."""
    import os

    from kvmesh.integration.launch_state import read_state, remove_state, resolve_run_dir

    path = resolve_run_dir(run_dir)
    state = read_state(path)
    if state is None or not state.alive():
        if state is not None:
            remove_state(path)
        raise not_running(path)
    os.kill(state.launcher_pid, signal.SIGTERM)
    with console(stderr=True).status("stopping the mesh"):
        killed = not _wait_gone(state, timeout)
        if killed:
            os.kill(state.launcher_pid, signal.SIGKILL)  # its members end with it
            _wait_gone(state, timeout)
            remove_state(path)
    how = f"killed after {timeout:.0f} s" if killed else "stopped"
    console().print(f"{how}: {len(state.members)} members")


def _wait_gone(state: "MeshState", timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while state.alive():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True
