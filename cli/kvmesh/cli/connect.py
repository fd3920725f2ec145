"""Finds the mesh that a command is about, and opens a client to it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvmesh.cli.errors import NOT_RUNNING, CommandFailed, not_running
from kvmesh.cli.options import Target

if TYPE_CHECKING:
    from kvmesh.client import AsyncClient
    from kvmesh.integration.launch_state import MeshState
    from kvmesh.services.common.config import SecurityConfig
    from kvmesh.services.common.security import Security

CONNECT_S = 3.0


def local_state(run_dir: Path | None) -> "MeshState":
    """The mesh that runs in a run directory. Raises CommandFailed (exit code 3) if none does."""
    from kvmesh.integration.launch_state import resolve_run_dir, running_state

    path = resolve_run_dir(run_dir)
    state = running_state(path)
    if state is None:
        raise not_running(path)
    return state


def resolve(target: Target) -> tuple[str, "Security"]:
    """Address and credentials of the mesh meant."""
    from kvmesh.services.common.config import load_config

    if target.address is not None:
        return target.address, security_of(load_config(target.config).security, target.token)
    state = local_state(target.run_dir)
    if not state.public_address:
        raise CommandFailed("the mesh is still starting; wait for 'kvmesh up' to say so", 1)
    return state.public_address, security_of(state.config.security, target.token)


def metrics_endpoints(target: Target) -> dict[str, str]:
    """Member id -> host:port of its metrics, which only its own machine can read: else empty."""
    if target.address is not None:
        return {}
    members = local_state(target.run_dir).members
    return {member.member_id: member.metrics for member in members if member.metrics}


def security_of(files: "SecurityConfig", token: str | None) -> "Security":
    from kvmesh.services.common.security import load_security

    security = load_security(files.cert, files.key, files.ca, files.token_file)
    return replace(security, token=token) if token else security


@asynccontextmanager
async def open_client(target: Target) -> AsyncIterator["AsyncClient"]:
    """A client that is known to reach the mesh. Raises CommandFailed (3) if nothing answers."""
    from kvmesh.client import AsyncClient

    address, security = resolve(target)
    async with AsyncClient(address, security) as client:
        try:
            await client.wait_connected(CONNECT_S)
        except TimeoutError:
            how = "with TLS" if security.ca else "without TLS"
            raise CommandFailed(
                f"no mesh answers at {address} ({how}) within {CONNECT_S:.0f} s; "
                "check the address and the [security] of --config",
                NOT_RUNNING,
            ) from None
        yield client
