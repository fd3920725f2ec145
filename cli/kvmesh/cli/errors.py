"""Exit codes, and errors as one line with the next step.

0 ok, 1 a request or check failed, 2 usage or configuration, 3 no mesh runs, 130 interrupted.
"""

import os
import traceback

import typer

OK = 0
FAILED = 1
USAGE = 2
NOT_RUNNING = 3
INTERRUPTED = 130


class CommandFailed(Exception):
    """Ends a command with a message and an exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def not_running(run_dir: object) -> CommandFailed:
    return CommandFailed(f"no mesh runs in {run_dir}; start one with 'kvmesh up'", NOT_RUNNING)


def report(error: Exception) -> int:
    """Says on stderr what went wrong; the exit code. Typer's own errors pass through."""
    if isinstance(error, typer.Exit):
        raise error
    if type(error).__module__.startswith("typer."):  # usage: Typer prints it, with the help's name
        raise error
    message, code = explain(error)
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    if os.environ.get("KVMESH_DEBUG"):
        traceback.print_exception(error)
    return code


def explain(error: Exception) -> tuple[str, int]:
    """The line to show and the exit code."""
    if isinstance(error, CommandFailed):
        return str(error), error.code
    # Imported late: an error may take a moment longer, a start may not.
    import grpc

    from kvmesh.backends.errors import BackendError
    from kvmesh.integration.launch import MeshFailed
    from kvmesh.services.common.errors import ConfigError, MeshError, Overloaded, from_rpc

    if isinstance(error, ConfigError | BackendError):
        return str(error), USAGE
    if isinstance(error, MeshFailed):
        return str(error), FAILED
    if isinstance(error, grpc.aio.AioRpcError):
        error = from_rpc(error, "mesh")
    if isinstance(error, Overloaded):
        return f"{error}; retry in {error.retry_after_s:.1f} s", FAILED
    if isinstance(error, MeshError):
        return str(error), FAILED
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", USAGE
    kind = type(error).__name__
    return f"{kind}: {error} (KVMESH_DEBUG=1 shows where)", FAILED
