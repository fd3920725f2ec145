"""Where each tensor of a safetensors checkpoint lies, without reading the tensors.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the data:
https://github.com/huggingface/safetensors#format. Offsets here count from the start of the file, so
that they can be handed to whoever maps it.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.config import read_json

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor in place: `length` bytes at `offset` of `file`, row-major, little-endian."""

    name: str
    file: Path
    offset: int
    length: int
    dtype: str  # a key of ITEM_BYTES, for tensors that pass `select`
    shape: tuple[int, ...]


def find_tensors(folder: Path) -> dict[str, TensorRef]:
    """All tensors of the checkpoint in a folder, by name.

    Raises CheckpointError for a missing or truncated file or a malformed header.
    """
    if (folder / INDEX_FILE).exists():
        return _read_sharded(folder)
    if not (folder / SINGLE_FILE).exists():
        raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    return read_header(folder / SINGLE_FILE)


def _read_sharded(folder: Path) -> dict[str, TensorRef]:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: weight_map names files outside the folder: {names}")
    files = {name: read_header(folder / name) for name in names}
    tensors: dict[str, TensorRef] = {}
    for tensor, name in weight_map.items():
        if tensor not in files[name]:
            raise CheckpointError(f"{folder / name}: tensor {tensor} of {INDEX_FILE} is missing")
        tensors[tensor] = files[name][tensor]
    return tensors


def read_header(file: Path) -> dict[str, TensorRef]:
    """The tensors of one safetensors file, each checked to lie within the file.

    Raises CheckpointError if the file is missing, truncated or malformed.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file}: is truncated or no safetensors file: a header of {header_bytes} "
                    f"bytes does not fit in {size} bytes"
                )
            header = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    header.pop("__metadata__", None)
    return {
        name: _parse_entry(file, name, entry, (8 + header_bytes, size))
        for name, entry in header.items()
    }


def _parse_entry(file: Path, name: str, entry: Any, data: tuple[int, int]) -> TensorRef:
    data_start, data_end = data
    try:
        begin, end = (int(each) for each in entry["data_offsets"])
        shape = tuple(int(each) for each in entry["shape"])
        dtype = str(entry["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: header of tensor {name} is malformed: {entry!r}") from error
    if begin < 0 or end < begin or any(each < 0 for each in shape):
        raise CheckpointError(f"{file}: header of tensor {name} is malformed: {entry!r}")
    if data_start + end > data_end:
        raise CheckpointError(
            f"{file}: is truncated: tensor {name} ends at byte {data_start + end}, "
            f"the file at byte {data_end}"
        )
    wanted = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    if wanted and end - begin != wanted:
        raise CheckpointError(
            f"{file}: tensor {name} holds {end - begin} bytes, {dtype} {shape} takes {wanted}"
        )
    return TensorRef(name, file, data_start + begin, end - begin, dtype, shape)


def select(
    tensors: Mapping[str, TensorRef], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, TensorRef]:
    """The tensors a model needs, each of the shape it must have; others are ignored.

    Raises CheckpointError for a tensor that is missing, of a wrong shape or unsupported dtype.
    """
    chosen: dict[str, TensorRef] = {}
    for name, shape in shapes.items():
        ref = tensors.get(name)
        if ref is None:
            raise CheckpointError(f"{folder}: tensor {name} {shape} is missing")
        if ref.shape != shape:
            raise CheckpointError(
                f"{ref.file}: tensor {name} has shape {ref.shape}, config.json asks for {shape}"
            )
        if ref.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{ref.file}: tensor {name} has dtype {ref.dtype}, "
                f"supported: {', '.join(ITEM_BYTES)}"
            )
        chosen[name] = ref
    return chosen


def read_tensor(ref: TensorRef) -> npt.NDArray[np.float32]:
    """A tensor's values, as fp32 of its shape. Raises CheckpointError if the file got shorter."""
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[ref.dtype]
    count = ref.length // ITEM_BYTES[ref.dtype]
    values = np.fromfile(ref.file, dtype, count=count, offset=ref.offset)
    if values.size != count:
        raise CheckpointError(f"{ref.file}: was truncated while it was read")
    if ref.dtype == "BF16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    floats: npt.NDArray[np.float32] = values.astype(np.float32).reshape(ref.shape)
    return floats


def hash_tensors(tensors: Iterable[TensorRef], seed: bytes) -> bytes:
    """SHA-256 over `seed` and each tensor's name, dtype, shape and bytes, in order of name.

    How a checkpoint is cut into files does not change it. Reads every byte once, streaming.
    """
    digest = hashlib.sha256(seed)
    for ref in sorted(tensors, key=lambda each: each.name):
        digest.update(f"\0{ref.name}\0{ref.dtype}\0{ref.shape}\0".encode())
        with ref.file.open("rb") as stream:
            stream.seek(ref.offset)
            left = ref.length
            while left:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise CheckpointError(f"{ref.file}: was truncated while it was read")
                digest.update(chunk)
                left -= len(chunk)
    return digest.digest()
