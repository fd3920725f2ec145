"""The backend that every machine has."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvmesh.backends.base import Model, ModelOptions
from kvmesh.backends.errors import BackendUnavailable

_NEEDED = ("numba", "onnx", "onnxruntime")
_INSTALL = "install kvmesh[cpu]"


class CpuBackend:
    """Opens checkpoints on the CPU."""

    def probe(self) -> str | None:
        """None, or which library is missing or in conflict. Imports none of them."""
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} cannot be imported; {_INSTALL}"
        if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
            # Both write the same files, and whichever was installed last is half overwritten.
            return "onnxruntime and onnxruntime-gpu are both installed; uninstall one of the two"
        return None

    def open(self, path: Path, options: ModelOptions) -> Model:
        """Raises CheckpointError for a bad checkpoint, BackendUnavailable if probe() objects."""
        reason = self.probe()
        if reason is not None:
            raise BackendUnavailable(f"backend 'cpu' cannot run here: {reason}", {"cpu": reason})
        from kvmesh.backends.cpu.model import CpuModel
        from kvmesh.backends.models.loader import load_checkpoint

        options.refuse_simulation("cpu")
        return CpuModel(load_checkpoint(path), options)


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
