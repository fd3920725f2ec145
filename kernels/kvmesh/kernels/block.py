"""The bytes of a block: a header, for each layer its four planes, a trailer. Little-endian.

    offset
    0    "KVMB"
    4    u16 format version
    6    u16 codec id
    8    16 B model fingerprint
    24   u32 num_layers
    28   u16 num_kv_heads
    30   u16 head_dim
    32   u32 num_tokens (64)
    36   u32 codebook version
    40   u64 payload bytes
    48   u64 rotation seed
    56   u32 size of the table of layers: 0 if every layer has the codec above
    60   4 B zero
    64   u8 codec id of each layer, zeros up to a multiple of 64   (the table of layers, or nothing)
         ┌ layer 0 ───────────────────────────────────────────────────────────────┐
         │ K codes  [head][dim / c][token][4 bytes]       sums run along dims     │
         │ V codes  [head][token / c][dim][4 bytes]       sums run along tokens   │
         │ K scales fp16 [head][token]  (absent from float codecs)                │
         │ V scales fp16 [head][token]  (absent from float codecs)                │
         └────────────────────────────────────────────────────────────────────────┘
         layer 1 ...
    -64  60 B zero
    -4   u32 CRC-32 (zlib) of every byte before it

Codes lie in words of 4 bytes. A word holds c consecutive elements of the axis that is summed over,
for one lane of the other axis; lanes follow each other. So a vector register of words is a row of
lanes (tokens for scores, dims for outputs), and no sum crosses lanes. Element 4 k + b of a word's c
is field k, from the lowest bits, of byte b: masking or shifting a register yields, in each lane,
four consecutive elements in four bytes, as integer dot products want them.

    8 bits   c =  4   one field a byte: u of codebook.py
    4 bits   c =  8   byte b:  element 4+b (high nibble), element b
    2 bits   c = 16   byte b:  elements 12+b, 8+b, 4+b, b
    3 bits            two planes per head, the 2-bit magnitudes of all codes as above, then their
             c = 32   signs: bit k of byte b is element 4k+b; padded with zeros to whole words
    16, 32            IEEE floats: K [head][dim][token], V [head][token][dim]

A CRC-32 finds every single flipped bit and every burst of up to 32 bits.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.codebook import CODEBOOK_VERSION
from kvmesh.kernels.errors import (
    BadMagic,
    ChecksumMismatch,
    ShortBlock,
    WrongFingerprint,
    WrongLayout,
    WrongVersion,
)
from kvmesh.kernels.layout import BLOCK_SIZE, CODECS, HEADER_BYTES, KvLayout
from kvmesh.kernels.rotation import ROTATION_SEED

MAGIC = b"KVMB"
FORMAT_VERSION = 3
_HEADER = struct.Struct("<4sHH16sIHHIIQQI4x")
_CHECKSUM = struct.Struct("<I")
_CODEC_NAMES = {codec.codec_id: name for name, codec in CODECS.items()}

Bytes = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


def _view(data: Bytes) -> memoryview:
    return data.data if isinstance(data, np.ndarray) else memoryview(data)


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a block says of itself. rotation_seed and codebook_version name the tables used."""

    layout: KvLayout
    num_tokens: int
    codebook_version: int
    payload_bytes: int
    rotation_seed: int


def parse_header(data: Bytes) -> BlockHeader:
    """Reads the header and its table of layers; trusts the rest to `verify`.

    Raises ShortBlock, BadMagic, WrongVersion or WrongLayout.
    """
    view = _view(data)
    if view.nbytes < HEADER_BYTES:
        raise ShortBlock(f"{view.nbytes} bytes, a header has {HEADER_BYTES}")
    magic, version, codec, fingerprint, layers, heads, dim, tokens, book, payload, seed, table = (
        _HEADER.unpack_from(view)
    )
    if magic != MAGIC:
        raise BadMagic(f"starts with {magic!r}, a block starts with {MAGIC!r}")
    for name, found, expected in (
        ("format version", version, FORMAT_VERSION),
        ("codebook version", book, CODEBOOK_VERSION),
        ("rotation seed", seed, ROTATION_SEED),
    ):
        if found != expected:
            raise WrongVersion(f"{name} is {found}, expected {expected}")
    try:
        own = _read_table(view, layers, table)
        layout = KvLayout(layers, heads, dim, _codec_name(codec), fingerprint, own)
    except ValueError as error:
        raise WrongLayout(str(error)) from error
    if tokens != BLOCK_SIZE:
        raise WrongLayout(f"num_tokens is {tokens}, expected {BLOCK_SIZE}")
    if table != layout.table_bytes:
        raise WrongLayout(f"table of layers is {table} bytes, expected {layout.table_bytes}")
    if payload != layout.payload_bytes:
        raise WrongLayout(f"payload is {payload} bytes, expected {layout.payload_bytes}")
    return BlockHeader(layout, tokens, book, payload, seed)


def _codec_name(codec_id: int) -> str:
    if codec_id not in _CODEC_NAMES:
        raise WrongLayout(f"codec id is {codec_id}, expected one of {sorted(_CODEC_NAMES)}")
    return _CODEC_NAMES[codec_id]


def _read_table(view: memoryview, layers: int, size: int) -> tuple[str, ...]:
    if not size:
        return ()
    if size < layers:
        raise WrongLayout(f"table of layers is {size} bytes, there are {layers} layers")
    if view.nbytes < HEADER_BYTES + size:
        raise ShortBlock(f"{view.nbytes} bytes, the header has {HEADER_BYTES + size}")
    return tuple(_codec_name(codec_id) for codec_id in view[HEADER_BYTES : HEADER_BYTES + layers])


def verify(data: Bytes, layout: KvLayout | None = None) -> BlockHeader:
    """Checks every byte of a sealed block, and against `layout` that it is of this model.

    Raises the BlockError that says what is wrong; without one, `data` may be attended to.
    """
    header = parse_header(data)
    view = _view(data)
    size = header.layout.block_bytes
    if view.nbytes != size:
        raise ShortBlock(f"{view.nbytes} bytes, expected {size}")
    (expected,) = _CHECKSUM.unpack_from(view, size - _CHECKSUM.size)
    found = zlib.crc32(view[: size - _CHECKSUM.size])
    if found != expected:
        raise ChecksumMismatch(f"checksum is {found:#010x}, expected {expected:#010x}")
    if layout is not None and header.layout != layout:
        _refuse(header.layout, layout)
    return header


def _refuse(found: KvLayout, expected: KvLayout) -> None:
    if found.fingerprint != expected.fingerprint:
        raise WrongFingerprint(
            f"fingerprint is {found.fingerprint.hex()}, expected {expected.fingerprint.hex()}"
        )
    differing = [
        f"{name.removesuffix('_label')} is {getattr(found, name)}, "
        f"expected {getattr(expected, name)}"
        for name in ("num_layers", "num_kv_heads", "head_dim", "codec_label")
        if getattr(found, name) != getattr(expected, name)
    ]
    raise WrongLayout("; ".join(differing))


def finish(layout: KvLayout, block: npt.NDArray[np.uint8]) -> None:
    """Writes header, trailer and checksum around planes that are all sealed.

    block: uint8 [layout.block_bytes], C-contiguous, changed in place.
    """
    if block.shape != (layout.block_bytes,):
        raise ShortBlock(f"shape is {block.shape}, expected ({layout.block_bytes},)")
    _HEADER.pack_into(
        block.data, 0, MAGIC, FORMAT_VERSION, layout.spec.codec_id, layout.fingerprint,
        layout.num_layers, layout.num_kv_heads, layout.head_dim, BLOCK_SIZE, CODEBOOK_VERSION,
        layout.payload_bytes, ROTATION_SEED, layout.table_bytes,
    )  # fmt: skip
    ids = [CODECS[name].codec_id for name in layout.layer_codecs]
    block[HEADER_BYTES : HEADER_BYTES + len(ids)] = ids
    block[HEADER_BYTES + len(ids) : layout.header_bytes] = 0
    block[layout.header_bytes + layout.payload_bytes :] = 0
    end = layout.block_bytes - _CHECKSUM.size
    _CHECKSUM.pack_into(block.data, end, zlib.crc32(block.data[:end]))
