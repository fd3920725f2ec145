"""The `kvmesh` command. Wiring only: each group has its own file, loaded libraries come later."""

from typing import Annotated

import typer

from kvmesh.cli import bench, devices, evaluate, grpc_call, keys, kv, lpu, model, plan, trace
from kvmesh.cli.chat import chat
from kvmesh.cli.demo import demo
from kvmesh.cli.doctor import doctor
from kvmesh.cli.generate import generate
from kvmesh.cli.route import route
from kvmesh.cli.serve import serve
from kvmesh.cli.simulate import simulate
from kvmesh.cli.status import models, status
from kvmesh.cli.top import top
from kvmesh.cli.up import down, up

app = typer.Typer(
    name="kvmesh",
    no_args_is_help=True,
    help="Serve language models as a mesh of gRPC services around one compressed KV block.",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("kvmesh"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    pass


for command in (up, down, status, top, generate, chat, route, models, doctor, demo, simulate):
    app.command()(command)
app.command(hidden=True)(serve)
app.add_typer(kv.app, name="kv")
app.add_typer(keys.app, name="keys")
app.add_typer(trace.app, name="trace")
app.add_typer(grpc_call.app, name="grpc")
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")
app.add_typer(model.app, name="model")
app.add_typer(devices.app, name="devices")
app.add_typer(plan.app, name="plan")
app.add_typer(lpu.app, name="lpu")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
