"""The CUDA backend on a device that the CPU stands in for: the same text, built by g++."""

from pathlib import Path
from typing import Any

from cuda_shim import ShimDevice

from kvmesh.backends.base import Model, ModelOptions
from kvmesh.backends.cuda.model import CudaModel
from kvmesh.backends.models.loader import load_checkpoint
from kvmesh.backends.registry import open_model
from kvmesh.kernels.cuda.plan import Splitting

SHIM = "cuda text on the CPU"
# Few spans: each has threads, and the shim runs one thread after the other.
SPLITTING = Splitting(3, 1)


def open_anywhere(backend: str, folder: Path, options: ModelOptions) -> Model:
    """As the registry does, but for SHIM."""
    if backend == SHIM:
        return open_on_shim(folder, options, warm=False)
    return open_model(backend, folder, options)


def open_on_shim(folder: Path, options: ModelOptions, **others: Any) -> CudaModel:
    return CudaModel(load_checkpoint(folder), options, ShimDevice(), SPLITTING, **others)
