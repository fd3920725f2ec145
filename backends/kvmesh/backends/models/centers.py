"""The mean K and V of each layer and head, which the codec subtracts before it compresses.

Subtracting one mean per head from every key is exact under softmax; leaving it in spends the bits
on it. Where they come from, first that exists:

1. `kvmesh_centers.safetensors` beside the weights, which `kvmesh model center` measures and writes;
2. the checkpoint's own biases of k_proj and v_proj: K's through the rotary embedding, averaged over
   positions, since that is the part of a key that no token changes;
3. zeros.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.config import LlamaConfig
from kvmesh.backends.models.rope import rope_tables
from kvmesh.backends.models.weights import TensorRef, read_header, read_tensor, select

CENTERS_FILE = "kvmesh_centers.safetensors"
_AVERAGED_POSITIONS = 4096  # a usual length; slow pairs of channels hardly turn within it

Centers = npt.NDArray[np.float32]


def centers_shape(config: LlamaConfig) -> tuple[int, int, int, int]:
    """[layers, 2 (K, V), kv heads, head dim]."""
    return config.num_layers, 2, config.num_kv_heads, config.head_dim


def find_centers(folder: Path, config: LlamaConfig, tensors: dict[str, TensorRef]) -> Centers:
    """fp32 [layers, 2, kv heads, head dim] by the order above. tensors: those of the checkpoint.

    Raises CheckpointError for a file of another shape or dtype, or values that are not finite.
    """
    path = folder / CENTERS_FILE
    if path.exists():
        source = str(path)
        centers = _read_file(path, config)
    elif config.attention_bias:
        source = f"{folder}: the mean K and V by the biases of k_proj and v_proj"
        centers = _from_biases(config, tensors)
    else:
        return np.zeros(centers_shape(config), np.float32)
    if not np.isfinite(centers).all():
        raise CheckpointError(f"{source}: holds values that are not finite")
    return centers


def write_centers(folder: Path, centers: Centers) -> Path:
    """Writes the file, in one rename. centers: fp32 [layers, 2, kv heads, head dim]."""
    path = folder / CENTERS_FILE
    fresh = path.with_name(path.name + ".new")
    try:
        save_file({"centers": np.ascontiguousarray(centers, np.float32)}, fresh)
        os.replace(fresh, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _read_file(path: Path, config: LlamaConfig) -> Centers:
    shape = centers_shape(config)
    ref = select(read_header(path), {"centers": shape}, path)["centers"]
    if ref.dtype != "F32":
        raise CheckpointError(f"{path}: tensor centers has dtype {ref.dtype}, supported: F32")
    return read_tensor(ref)


def _from_biases(config: LlamaConfig, tensors: dict[str, TensorRef]) -> Centers:
    centers = np.zeros(centers_shape(config), np.float32)
    cos, sin = rope_tables(
        config.rope, config.head_dim, min(_AVERAGED_POSITIONS, config.max_context)
    )
    mean_cos, mean_sin = (table.mean(axis=0, dtype=np.float64) for table in (cos, sin))
    half = config.head_dim // 2
    for layer in range(config.num_layers):
        for kind, name in enumerate(("k_proj", "v_proj")):
            bias = read_tensor(tensors[f"model.layers.{layer}.self_attn.{name}.bias"])
            centers[layer, kind] = bias.reshape(config.num_kv_heads, config.head_dim)
        low, high = centers[layer, 0, :, :half].copy(), centers[layer, 0, :, half:].copy()
        centers[layer, 0, :, :half] = low * mean_cos - high * mean_sin
        centers[layer, 0, :, half:] = high * mean_cos + low * mean_sin
    return centers
