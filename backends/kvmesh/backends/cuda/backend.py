"""The backend of NVIDIA GPUs from Ampere on."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvmesh.backends.base import Model, ModelOptions
from kvmesh.backends.errors import BackendUnavailable
from kvmesh.kernels.cuda.device import CupyDevice, unavailable_reason

_INSTALL = "install kvmesh[cuda]"


class CudaBackend:
    """Opens checkpoints on the first GPU that CUDA shows (CUDA_VISIBLE_DEVICES chooses)."""

    def probe(self) -> str | None:
        """None, or what is missing: a library, the driver, a GPU, one that is new enough."""
        if importlib.util.find_spec("onnx") is None:
            return f"onnx cannot be imported; {_INSTALL}"
        return unavailable_reason() or _runtime_reason()

    def open(self, path: Path, options: ModelOptions) -> Model:
        """Raises CheckpointError for a bad checkpoint, BackendUnavailable if probe() objects."""
        reason = self.probe()
        if reason is not None:
            raise BackendUnavailable(f"backend 'cuda' cannot run here: {reason}", {"cuda": reason})
        options.refuse_simulation("cuda")
        import onnxruntime

        from kvmesh.backends.cuda.model import CudaModel
        from kvmesh.backends.models.loader import load_checkpoint

        # CUDA's libraries from wheels are not where the loader looks.
        onnxruntime.preload_dlls()
        return CudaModel(load_checkpoint(path), options, CupyDevice())


def _runtime_reason() -> str | None:
    """ONNX Runtime comes in two distributions with the same files; only one knows the GPU."""
    if _installed("onnxruntime-gpu"):
        if _installed("onnxruntime"):
            return "onnxruntime and onnxruntime-gpu are both installed; uninstall onnxruntime"
        return None
    if _installed("onnxruntime"):
        return f"onnxruntime is the build without CUDA; uninstall it and {_INSTALL}"
    return f"onnxruntime-gpu is not installed; {_INSTALL}"


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
