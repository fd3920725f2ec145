"""`kvmesh serve`: one member in this process. The launcher runs it; a deployment may, too.

The launcher runs this module alone, which starts sooner than the whole command.
"""

from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cli.errors import CommandFailed
from kvmesh.cli.options import ConfigFile, command

Member = Annotated[
    str, typer.Argument(help="router, tokenizer, kvcache-N, worker-N, gateway or traces.")
]
MeshAddress = Annotated[str, typer.Option(help="host:port of the router's Mesh service.")]
Launcher = Annotated[int | None, typer.Option(hidden=True)]
StateDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="For the trace store, and for the configuration if no file."),
]


@command
def serve(
    member: Member,
    mesh_address: MeshAddress = "",
    run_dir: StateDir = None,
    config: ConfigFile = None,
    launcher_fd: Launcher = None,
    launcher_pid: Launcher = None,
) -> None:
    """Run one member of a mesh until SIGTERM."""
    from kvmesh.services.common.poller import choose_poller

    choose_poller()  # before anything below brings gRPC in
    from kvmesh.integration.launch_member import (
        LauncherTie,
        MemberJob,
        die_with_parent,
        run_member,
    )
    from kvmesh.integration.launch_state import read_state
    from kvmesh.services.common.config import load_config

    if launcher_pid is not None:
        die_with_parent(launcher_pid)
    tie = LauncherTie(launcher_fd)
    if config is None and run_dir is not None:
        state = read_state(run_dir)
        if state is None:
            raise CommandFailed(f"no mesh was started in {run_dir}; give --config", 2)
        mesh_config = state.config
    else:
        mesh_config = load_config(config)
    if member not in ("router", "traces") and not mesh_address:
        raise CommandFailed(f"{member} needs --mesh-address, the router's", 2)
    run_member(MemberJob(member, mesh_config, mesh_address, run_dir), tie)


if __name__ == "__main__":
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command()(serve)
    alone()
