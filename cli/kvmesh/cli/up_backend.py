"""What `kvmesh up` may say of the workers' devices instead of the mesh.toml."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvmesh.services.common.config import MeshConfig

BackendName = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="Backend of every worker and shard, instead of the mesh.toml's.",
        show_default=False,
    ),
]


Device = Annotated[
    str | None,
    typer.Option("--device", help="Device that a simulated backend is: a name or a device file."),
]
Devices = Annotated[int | None, typer.Option("--devices", min=1, help="So many of it act as one.")]
TimedAs = Annotated[
    str | None,
    typer.Option(
        "--as-model", help="Time the steps of this model's shape; the tokens stay the mesh's own."
    ),
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Format of the weights that are timed.")
]


def with_backend(config: "MeshConfig", name: str) -> "MeshConfig":
    """The mesh with that backend for every worker, and for the shards' memory where it has one.

    Raises ConfigError if it cannot run here.
    """
    from kvmesh.backends.registry import AUTO, unavailable_reason
    from kvmesh.services.common.errors import ConfigError

    reason = None if name == AUTO else unavailable_reason(name)
    if reason is not None:
        raise ConfigError(f"--backend {name}: {reason}")
    workers = tuple(each.model_copy(update={"backend": name}) for each in config.workers)
    shards = config.kvcache.model_copy(update={"backend": "cuda" if name == "cuda" else "cpu"})
    return config.model_copy(update={"workers": workers, "kvcache": shards})


def simulating(config: "MeshConfig", given: dict[str, object]) -> "MeshConfig":
    """The mesh whose every worker simulates so. Raises ConfigError for an unknown name."""
    from kvmesh.backends.architectures import load_shape
    from kvmesh.backends.devices.library import load_device
    from kvmesh.backends.errors import BackendError
    from kvmesh.services.common.errors import ConfigError

    device, model = str(given.get("device", "")), str(given.get("model", ""))
    try:
        if device:
            load_device(device)
        if model:
            load_shape(model)
    except BackendError as error:
        raise ConfigError(str(error)) from error
    for name, value in (("device", device), ("model", model)):
        if value and Path(value).exists():
            given[name] = str(Path(value).absolute())
    workers = tuple(
        each.model_copy(update={"simulate": each.simulate.model_copy(update=given)})
        for each in config.workers
    )
    return config.model_copy(update={"workers": workers})
