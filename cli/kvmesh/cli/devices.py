"""`kvmesh devices`: the devices that can be simulated, and where every number is from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cli.options import Json, command, refuse_options
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.backends.devices import Device, Figure

app = typer.Typer(help="Show the devices that can be simulated and priced.")

Folder = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        envvar="KVMESH_DEVICES",
        help="A folder of your own device files, which win over the built-in ones.",
        show_default=False,
    ),
]
DTYPES = ("bf16", "fp8", "nvfp4", "int8")


@command
def _group(context: typer.Context, folder: Folder = None, json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_(folder=folder, json=json)
    else:
        refuse_options(context)


@command
def list_(folder: Folder = None, json: Json = False) -> None:
    """List the devices, one line each."""
    from kvmesh.backends.devices import device_names, load_device

    devices = [load_device(name, folder) for name in device_names(folder)]
    if json:
        print_json([_summary(device) for device in devices])
        return
    columns = (
        "device", "title", "model", ">memory GB", ">TB/s", ">bf16 TF", ">fp8", ">nvfp4", ">int8",
        ">scale-up GB/s", ">domain", ">TGP W", ">$/h",
    )  # fmt: skip
    print_table("", columns, [_row(device) for device in devices])
    console().print("\npeaks are dense, prices are the default preset; kvmesh devices show NAME")


@command
def show(
    name: Annotated[str, typer.Argument(help="A device's name, or a path to a device file.")],
    folder: Folder = None,
    json: Json = False,
) -> None:
    """Show every number of a device with its tag and its source."""
    from kvmesh.backends.devices import load_device
    from kvmesh.backends.devices.device import TAGS

    device = load_device(name, folder)
    if json:
        print_json(device.model_dump(mode="json"))
        return
    out = console()
    out.print(f"{device.name}: {device.title}, {device.architecture}, timed by {device.model}")
    if device.notes:
        out.print(device.notes)
    rows = [(p, f"{f.value:.4g}", f.tag, _source(f)) for p, f in device.figures()]
    print_table("", ("figure", ">value", "tag", "source"), rows)
    tags = ", ".join(f"{tag} {meaning}" for tag, meaning in TAGS.items())
    out.print(f"\nbytes, seconds, FLOP/s, watts, dollars; tags: {tags}")


def _source(figure: "Figure") -> str:
    taken = f" (taken from {figure.taken_from})" if figure.taken_from else ""
    fitted = f" (fitted on {figure.fitted_on})" if figure.fitted_on else ""
    return figure.source + taken + fitted


def _summary(device: "Device") -> dict[str, Any]:
    price = device.price.per_hour[device.price.default].value if device.price else None
    return {
        "name": device.name,
        "title": device.title,
        "kind": device.kind,
        "architecture": device.architecture,
        "model": device.model,
        "memory_bytes": device.memory.bytes.value,
        "bandwidth_bytes_s": device.memory.bandwidth_bytes_s.value,
        "peak": {dtype: figure.value for dtype, figure in device.peak.items()},
        "scale_up_bytes_s": device.scale_up.bandwidth_bytes_s.value,
        "domain": device.domain,
        "tgp_w": device.power.tgp_w.value if device.power.tgp_w else None,
        "price_per_hour": price,
    }


def _row(device: "Device") -> tuple[str, ...]:
    found = _summary(device)
    peaks = [device.peak.get(dtype) for dtype in DTYPES]
    return (
        device.name,
        device.title,
        device.model,
        f"{found['memory_bytes'] / 1e9:.4g}",
        f"{found['bandwidth_bytes_s'] / 1e12:.4g}",
        *(f"{peak.value / 1e12:,.0f}" if peak else "" for peak in peaks),
        f"{found['scale_up_bytes_s'] / 1e9:,.0f}",
        str(device.domain),
        f"{found['tgp_w']:,.0f}" if found["tgp_w"] else "",
        f"{found['price_per_hour']:.2f}" if found["price_per_hour"] else "",
    )


app.callback(invoke_without_command=True)(_group)
app.command("list")(list_)
app.command()(show)
