"""Shapes of published models, without weights: what the cost of a step is worked out from."""

from kvmesh.backends.architectures.formats import KV_FORMATS, WEIGHT_BYTES, kv_vector_bytes
from kvmesh.backends.architectures.library import load_shape, shape_names
from kvmesh.backends.architectures.shape import ModelShape

__all__ = [
    "KV_FORMATS",
    "WEIGHT_BYTES",
    "ModelShape",
    "kv_vector_bytes",
    "load_shape",
    "shape_names",
]
