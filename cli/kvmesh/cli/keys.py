"""`kvmesh keys`: API keys of tenants, in the file that a mesh reads."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.errors import CommandFailed
from kvmesh.cli.options import ConfigFile, Json, command
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.services.common.api_keys import KeyDocument

app = typer.Typer(no_args_is_help=True, help="API keys of tenants, and what each may take.")

TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="Who pays; made if unknown.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="As 'kvmesh keys list' shows it.")]
KeysFile = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", envvar="KVMESH_KEYS_FILE", dir_okay=False, show_default=False,
        help="The key file, instead of security.keys_file of --config.",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Allowance:
    """Limits of a tenant; what is not given stays as it is, at first without a limit."""

    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests in a minute.", show_default=False)
    ] = None
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt and output tokens in a minute.", show_default=False),
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at once.", show_default=False)
    ] = None


@command
def new(
    tenant: TenantName,
    limits: Allowance,
    file: KeysFile = None,
    config: ConfigFile = None,
    json: Json = False,
) -> None:
    """Make a key. It is shown this once and kept nowhere; a mesh that runs knows it in a second."""
    from kvmesh.services.common.api_keys import add_key, key_id
    from kvmesh.services.common.key_file import changing

    path = _path(file, config)
    given = {name: value for name, value in asdict(limits).items() if value is not None}
    with changing(path) as held:
        held[0], key = add_key(held[0], tenant, given, int(time.time()))
    if json:
        print_json({"file": str(path), "tenant": tenant, "id": key_id(key), "key": key})
        return
    console(stderr=True).print(f"key {key_id(key)} of {tenant}, in {path}; it is not shown again:")
    typer.echo(key)


@command
def show(file: KeysFile = None, config: ConfigFile = None, json: Json = False) -> None:
    """List the keys, without what would let anybody in."""
    from kvmesh.services.common.key_file import read_document

    document = read_document(_path(file, config))
    rows = _rows(document)
    if json:
        print_json(rows)
        return
    print_table(
        "",
        ("id", "tenant", "made", "state", ">requests/min", ">tokens/min", ">at once"),
        [
            (
                row["id"], row["tenant"], _day(row["created"]), row["state"],
                *(row[name] or "" for name in _LIMITS),
            )
            for row in rows
        ],
    )  # fmt: skip


@command
def revoke(key: KeyId, file: KeysFile = None, config: ConfigFile = None) -> None:
    """Take a key back: a mesh that runs refuses it within seconds. What runs already ends."""
    from kvmesh.services.common.api_keys import revoke_key
    from kvmesh.services.common.key_file import changing, read_document

    path = _path(file, config)
    read_document(path)  # one that is not there is not made
    with changing(path) as held:
        held[0] = revoke_key(held[0], key, int(time.time()))
    console().print(f"key {key} is revoked")


_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")


def _rows(document: "KeyDocument") -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for entry in document.keys:
        tenant = document.tenants[entry.tenant]
        state = "revoked" if entry.revoked else "disabled" if tenant.disabled else "active"
        row = {"id": entry.id, "tenant": entry.tenant, "created": entry.created, "state": state}
        found.append({**row, **{name: getattr(tenant, name) for name in _LIMITS}})
    return found


def _day(seconds: object) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(float(str(seconds))))


def _path(file: Path | None, config: Path | None) -> Path:
    from kvmesh.services.common.config import load_config

    found = file or load_config(config).security.keys_file
    if found is None:
        raise CommandFailed(
            "no key file: give --file, or --config with security.keys_file in it", 2
        )
    return found.expanduser()


app.command("new")(new)
app.command("list")(show)
app.command("revoke")(revoke)
