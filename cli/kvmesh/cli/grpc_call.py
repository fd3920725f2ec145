"""`kvmesh grpc`: look into and call any gRPC server that has reflection."""

import json as json_format
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from kvmesh.cli.connect import CONNECT_S, resolve
from kvmesh.cli.errors import FAILED, NOT_RUNNING, USAGE, CommandFailed
from kvmesh.cli.options import Json, Target, command
from kvmesh.cli.render import print_json, print_table

if TYPE_CHECKING:
    import grpc
    from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor

    from kvmesh.client.reflection import ReflectedServer
    from kvmesh.services.common.security import Security

app = typer.Typer(no_args_is_help=True, help="Look into and call any gRPC server.")


@dataclass(frozen=True)
class Peer:
    """How to reach the server; without --address it is the mesh's router."""

    tls: Annotated[bool, Option("--tls", help="TLS with the system's authorities.")] = False
    ca: Annotated[Path | None, Option(help="TLS: PEM of the authority.", dir_okay=False)] = None
    cert: Annotated[Path | None, Option(help="PEM to show as a client.", dir_okay=False)] = None
    key: Annotated[Path | None, Option(help="Its key.", dir_okay=False)] = None
    token_file: Annotated[Path | None, Option(help="Bearer token.", dir_okay=False)] = None
    authority: Annotated[str, Option(help="Name that the certificate is for.")] = ""
    header: Annotated[
        list[str] | None, Option("--header", "-H", help="'name: value', may be repeated.")
    ] = None
    timeout: Annotated[float, Option(min=0.01, help="Seconds of each call.")] = 600.0


Symbol = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="A service, method or message.")
]
Method = Annotated[str, typer.Argument(help="As kvmesh.v1.Inference/Generate.")]
Request = Annotated[
    str | None,
    typer.Argument(
        metavar="[JSON]",
        help="The request; several, one after another, for a stream of them. "
        "'-' reads stdin, nothing is {}.",
    ),
]
HealthName = Annotated[
    str, typer.Argument(metavar="[SERVICE]", help="Nothing: the server as a whole.")
]


@command
def ls(target: Target, peer: Peer, name: Symbol = None, json: Json = False) -> None:
    """List services; of a service its methods, of a message its fields."""
    with _server(target, peer) as server:
        if name is None:
            services = server.services()
            if json:
                print_json(services)
            else:
                typer.echo("\n".join(services))
            return
        rows = _describe(server.find(name))
    if json:
        print_json([dict(zip(("name", "of"), row, strict=True)) for row in rows])
    else:
        print_table("", ("name", ""), rows)


@command
def call(target: Target, peer: Peer, method: Method, request: Request = None) -> None:
    """Call a method: JSON in, one JSON document out for each response, as it comes."""
    from contextlib import closing

    with _server(target, peer) as server:
        found = server.method(method)
        messages = [server.parse(found, record) for record in _documents(request)]
        with closing(server.call(found, messages)) as responses:
            for response in responses:
                print_json(server.plain(response))
                sys.stdout.flush()


@command
def health(target: Target, peer: Peer, service: HealthName = "", json: Json = False) -> None:
    """Ask the standard health service; exit code 1 unless it says SERVING."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with _channel(target, peer) as (channel, metadata):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        reply = stub.Check(request, timeout=peer.timeout, metadata=metadata)
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    if json:
        print_json({"service": service, "status": status})
    else:
        typer.echo(status)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(FAILED)


@contextmanager
def _server(target: Target, peer: Peer) -> Iterator["ReflectedServer"]:
    from kvmesh.client.reflection import ReflectedServer, ReflectionError

    with _channel(target, peer) as (channel, metadata):
        try:
            yield ReflectedServer(channel, metadata, peer.timeout)
        except ReflectionError as error:
            raise CommandFailed(str(error), USAGE) from error


@contextmanager
def _channel(
    target: Target, peer: Peer
) -> Iterator[tuple["grpc.Channel", tuple[tuple[str, str], ...]]]:
    """A channel that stands, and the metadata of calls. A call's status becomes CommandFailed."""
    import grpc

    from kvmesh.services.common.client import CHANNEL_OPTIONS, call_metadata

    address, security = _credentials(target, peer)
    metadata = (*call_metadata(security), *_headers(peer.header or ()))
    options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
    if peer.authority:
        options.append(("grpc.ssl_target_name_override", peer.authority))
    tls = security.channel_credentials()
    if tls is None and peer.tls:
        tls = grpc.ssl_channel_credentials()
    if tls is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        channel = grpc.secure_channel(address, tls, options=options)
    with channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_S)
        except grpc.FutureTimeoutError:
            how = "without TLS" if tls is None else "with TLS"
            raise CommandFailed(
                f"nothing answers at {address} ({how}) within {CONNECT_S:.0f} s", NOT_RUNNING
            ) from None
        try:
            yield channel, metadata
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)  # what the library raises is both
            raise CommandFailed(
                f"{error.code().name}: {error.details() or 'no details'}", FAILED
            ) from error


def _credentials(target: Target, peer: Peer) -> tuple[str, "Security"]:
    from dataclasses import replace

    from kvmesh.client import load_credentials

    address, security = resolve(target)
    if not (peer.ca or peer.cert or peer.key or peer.token_file):
        return address, security
    own = load_credentials(peer.ca, peer.token_file, peer.cert, peer.key)
    return address, replace(own, token=target.token) if target.token else own


def _headers(given: "tuple[()] | list[str]") -> Iterator[tuple[str, str]]:
    for header in given:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise CommandFailed(f"--header {header!r} is not 'name: value'", USAGE)
        yield name.strip().lower(), value.strip()


def _documents(text: str | None) -> list[Any]:
    """JSON documents that follow one another. Raises CommandFailed (2)."""
    if text == "-":
        text = sys.stdin.read()
    if text is None:
        return [{}]
    decoder = json_format.JSONDecoder()
    found, position = [], 0
    try:
        while position < len(text.rstrip()):
            position += len(text[position:]) - len(text[position:].lstrip())
            record, position = decoder.raw_decode(text, position)
            found.append(record)
    except json_format.JSONDecodeError as error:
        raise CommandFailed(f"the request is not JSON: {error}", USAGE) from error
    return found


def _describe(
    found: "ServiceDescriptor | MethodDescriptor | Descriptor",
) -> list[tuple[str, str]]:
    """Rows of a name and what it is."""
    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

    if isinstance(found, MethodDescriptor):
        return [(found.name, _signature(found))]
    if isinstance(found, ServiceDescriptor):
        return [(method.name, _signature(method)) for method in found.methods]
    return [(field.name, _type_of(field)) for field in found.fields]


def _signature(method: "MethodDescriptor") -> str:
    given = ("stream " if method.client_streaming else "") + method.input_type.full_name
    back = ("stream " if method.server_streaming else "") + method.output_type.full_name
    return f"({given}) returns ({back})"


def _type_of(field: Any) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"map<{_type_of(key)}, {_type_of(value)}>"
    named = field.message_type or field.enum_type
    names = {field.TYPE_STRING: "string", field.TYPE_BYTES: "bytes", field.TYPE_BOOL: "bool"}
    kinds = (
        "DOUBLE", "FLOAT", "INT64", "UINT64", "INT32", "UINT32", "FIXED64", "FIXED32", "SINT32",
        "SINT64", "SFIXED32", "SFIXED64",
    )  # fmt: skip
    names |= {getattr(field, f"TYPE_{kind}"): kind.lower() for kind in kinds}
    name = named.full_name if named is not None else names[field.type]
    repeated = "repeated " if field.is_repeated else ""
    choice = field.containing_oneof
    group = f", one of {choice.name}" if choice is not None and len(choice.fields) > 1 else ""
    return f"{repeated}{name}{group}"


app.command()(ls)
app.command()(call)
app.command()(health)
