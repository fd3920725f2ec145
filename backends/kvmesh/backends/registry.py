"""Backend names and how to open a model with one of them.

A backend's module is imported only when the backend is asked for, so listing or opening one never
pulls in the libraries of another. Third parties register a class under the entry-point group
`kvmesh.backends`; the name is the entry point's name.
"""

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from kvmesh.backends.base import Backend, Model, ModelOptions
from kvmesh.backends.errors import BackendUnavailable

GROUP = "kvmesh.backends"
AUTO = "auto"

_BUILT_IN = {
    "cpu": "kvmesh.backends.cpu.backend:CpuBackend",
    "cuda": "kvmesh.backends.cuda.backend:CudaBackend",
    "lpu": "kvmesh.backends.lpu.backend:LpuBackend",
    "simulated": "kvmesh.backends.simulated.backend:SimulatedBackend",
    "blackwell": "kvmesh.backends.simulated.backend:blackwell",
    "rubin": "kvmesh.backends.simulated.backend:rubin",
}
# Fastest first; only backends that measure real time. `cuda` is asked for by name as long as it has
# not been run on a GPU.
_AUTO_ORDER = ("cpu",)


def _entries() -> dict[str, EntryPoint]:
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    # A built-in name cannot be taken over by an installed package.
    found.update({name: EntryPoint(name, value, GROUP) for name, value in _BUILT_IN.items()})
    return dict(sorted(found.items()))


def create_backend(name: str) -> Backend:
    """The backend of that name, not yet probed.

    Raises BackendUnavailable for an unknown name or one whose module cannot be imported.
    """
    entries = _entries()
    if name not in entries:
        known = ", ".join([AUTO, *entries])
        raise BackendUnavailable(f"no backend is named {name!r}; known names: {known}")
    try:
        backend: Backend = entries[name].load()()
    except Exception as error:  # an import may fail in any way a third party can think of
        reason = f"cannot be loaded: {type(error).__name__}: {error}"
        raise BackendUnavailable(f"backend {name!r} {reason}", {name: reason}) from error
    return backend


def unavailable_reason(name: str) -> str | None:
    """None if the named backend runs on this machine, else why not."""
    try:
        return create_backend(name).probe()
    except BackendUnavailable as error:
        return str(error)


def list_backends() -> dict[str, str | None]:
    """Every known backend: None if it runs on this machine, else why not."""
    return {name: unavailable_reason(name) for name in _entries()}


def open_model(name: str, path: Path, options: ModelOptions) -> Model:
    """Opens a checkpoint folder with the named backend, or with `auto` the first that runs here.

    Raises BackendUnavailable with the reasons of all backends tried, and CheckpointError for a
    bad checkpoint; a bad checkpoint ends `auto` too, as no other device would mend it.
    """
    failures: dict[str, str] = {}
    for candidate in _AUTO_ORDER if name == AUTO else (name,):
        try:
            backend = create_backend(candidate)
            reason = backend.probe()
            if reason is None:
                return backend.open(path, options)
        except BackendUnavailable as error:
            reason = str(error)
        failures[candidate] = reason
    told = "; ".join(f"{tried}: {reason}" for tried, reason in failures.items())
    raise BackendUnavailable(f"no backend can open {path}: {told}", failures)
