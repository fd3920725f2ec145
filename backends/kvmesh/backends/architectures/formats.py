"""Bytes of a weight and of a cached vector, by the name of the format."""

import functools

from kvmesh.kernels.layout import BLOCK_SIZE, CODECS, MAX_HEAD_DIM, KvLayout

# Bytes of a weight, scales included: fp8_block has an fp32 scale per 128 x 128, nvfp4 an fp8 one
# per 16, mxfp4 one of 8 bits per 32.
WEIGHT_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp8_block": 1.0 + 4 / 128**2,
    "nvfp4": 0.5 + 1 / 16,
    "mxfp4": 0.5 + 1 / 32,
}

# fp8 is the hardware's, one byte and no scales; the others are this project's codecs.
KV_FORMATS = ("fp8", *CODECS)


@functools.cache
def kv_vector_bytes(head_dim: int, kv_format: str) -> tuple[float, float]:
    """Bytes of one cached key and of one cached value of head_dim elements, scales included.

    Taken from the planes of a block of kernels.layout. Raises ValueError for an unknown format or
    a size that blocks do not hold.
    """
    if kv_format == "fp8":
        return float(head_dim), float(head_dim)
    planes = KvLayout(1, 1, head_dim, kv_format, bytes(16)).planes(0)
    keys = planes.value_codes - planes.key_codes + planes.value_scales - planes.key_scales
    values = planes.key_scales - planes.value_codes + planes.end - planes.value_scales
    return keys / BLOCK_SIZE, values / BLOCK_SIZE


@functools.cache
def latent_bytes(size: int, kv_format: str) -> float:
    """Bytes of one vector that serves as key and value at once (MLA), at the key's width.

    Longer ones are cut into vectors that blocks can hold, each with its own scale.
    """
    parts = -(-size // MAX_HEAD_DIM)
    return parts * kv_vector_bytes(size // parts, kv_format)[0]
