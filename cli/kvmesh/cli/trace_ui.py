"""`kvmesh trace ui`: the page of the stored traces, on loopback."""

from typing import Annotated

import typer

from kvmesh.cli.options import RunDir, command
from kvmesh.cli.render import console

Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Show it in the browser.")]
DEFAULT_PORT = 50080


@command
async def ui(run_dir: RunDir = None, port: Port = DEFAULT_PORT, open: Open = False) -> None:
    """Serve the page of the traces until Ctrl-C. Works without a running mesh."""
    import webbrowser

    from kvmesh.integration.launch_state import resolve_run_dir, traces_path
    from kvmesh.integration.trace_page import serve_page

    store = traces_path(resolve_run_dir(run_dir))

    def started(url: str) -> None:
        console().print(f"traces of {store}\n[bold]{url}[/bold]\nCtrl-C stops it.")
        if open:
            webbrowser.open(url)

    await serve_page(store, port, started)
