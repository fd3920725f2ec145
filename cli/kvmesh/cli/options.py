"""Options that several commands share, and the frame that every command runs in.

A parameter of a command whose type is a dataclass stands for one option per field; so options that
belong together are written, documented and passed on once.
"""

import inspect
from collections.abc import Callable, Coroutine
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from kvmesh.cli.errors import INTERRUPTED, USAGE, CommandFailed, report

RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        envvar="KVMESH_RUN_DIR",
        help="Where the mesh keeps its state, logs and spans "
        "(default: $XDG_STATE_HOME/kvmesh/default).",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A mesh.toml.", dir_okay=False, show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@dataclass(frozen=True)
class Target:
    """The mesh to talk to: the one of a run directory, or the one at an address."""

    run_dir: RunDir = None
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            envvar="KVMESH_ADDRESS",
            help="host:port of a mesh elsewhere, instead of the one in the run directory.",
            show_default=False,
        ),
    ] = None
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            envvar="KVMESH_TOKEN",
            help="Bearer token; other users can see an option, so prefer the variable.",
            show_default=False,
        ),
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="A mesh.toml whose security table is used with --address.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None


def command(run: Callable[..., Any]) -> Callable[..., None]:
    """`run` as Typer takes it: dataclasses spread into options, coroutines awaited, and every
    error a line on stderr and an exit code instead of a traceback."""
    hints = get_type_hints(run, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _spread(hints[name])
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=hints[name], kind=kind))

    def framed(**values: Any) -> None:
        arguments = {name: value for name, value in values.items() if name in hints}
        for name, group in groups.items():
            arguments[name] = group(**{f.name: values[f.name] for f in fields(group)})
        _finish(run, arguments)

    framed.__name__, framed.__doc__ = run.__name__, run.__doc__
    framed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    framed.__annotations__ = {p.name: p.annotation for p in parameters}
    return framed


def refuse_options(context: typer.Context) -> None:
    """For a group that is a command too: options before a subcommand would be lost.

    Raises CommandFailed (2) naming the first.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise CommandFailed(f"{option} belongs behind '{context.invoked_subcommand}'", USAGE)


def _spread(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(f.name, kind, default=_default(f), annotation=hints[f.name])
        for f in fields(group)
    ]


def _default(field: Field[Any]) -> Any:
    return field.default if field.default is not MISSING else inspect.Parameter.empty


def _finish(run: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        result = run(**arguments)
        if inspect.iscoroutine(result):
            _await(result)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
        raise typer.Exit(1) from None
    except Exception as error:
        raise typer.Exit(report(error)) from None


def _await(work: Coroutine[Any, Any, None]) -> None:
    import asyncio  # which half of all commands, and --help, do without

    try:
        asyncio.run(work)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
