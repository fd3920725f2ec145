"""A checkpoint folder, checked and described: config, tensors in place, centers, fingerprint."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.centers import find_centers
from kvmesh.backends.models.config import LlamaConfig, read_config
from kvmesh.backends.models.llama import build_stage, weight_shapes
from kvmesh.backends.models.weights import (
    TensorRef,
    find_tensors,
    hash_tensors,
    select,
)

FINGERPRINT_BYTES = 16

# Fields of the config that do not change K and V.
_NOT_IN_FINGERPRINT = ("eos_token_ids", "bos_token_id", "max_context")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that passed its checks.

    folder: where config.json and the tokenizer's files lie. root: folder that every weight file
    lies in, links resolved. centers: fp32
    [layers, 2 (K, V), kv heads, head dim], the means that the codec subtracts (models.centers).
    fingerprint: 16 bytes over config, weights and centers.
    """

    name: str
    config: LlamaConfig
    tensors: dict[str, TensorRef]
    folder: Path
    root: Path
    centers: npt.NDArray[np.float32]
    fingerprint: bytes

    def stage(self, index: int) -> bytes:
        """The serialised ONNX model of one stage (see models.llama)."""
        return build_stage(self.config, self.tensors, self.root, index)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads and checks a Hugging Face checkpoint folder; the weights are hashed, not kept.

    Raises CheckpointError naming the file that is missing, truncated or not supported.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder; a checkpoint folder holds config.json")
    config = read_config(folder)
    tensors = select(find_tensors(folder), weight_shapes(config), folder)
    centers = find_centers(folder, config, tensors)
    files = {ref.file.resolve().parent for ref in tensors.values()}
    return Checkpoint(
        name=folder.resolve().name,
        config=config,
        tensors=tensors,
        folder=folder,
        root=Path(os.path.commonpath(files)),
        centers=centers,
        fingerprint=_fingerprint(config, tensors, centers),
    )


def _fingerprint(
    config: LlamaConfig, tensors: dict[str, TensorRef], centers: npt.NDArray[np.float32]
) -> bytes:
    fields = {k: v for k, v in asdict(config).items() if k not in _NOT_IN_FINGERPRINT}
    seed = json.dumps(fields, sort_keys=True).encode() + centers.astype("<f4").tobytes()
    return hash_tensors(tensors.values(), seed)[:FINGERPRINT_BYTES]
