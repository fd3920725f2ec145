"""Where things lie in a sealed block (see block.py for the bytes)."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from kvmesh.kernels.rotation import has_rotation

BLOCK_SIZE = 64  # tokens; the same in every process of every mesh, part of the block format
HEADER_BYTES = 64  # without the table of layers
TRAILER_BYTES = 64  # keeps blocks and planes on cache lines; its last 4 bytes are the checksum
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256
FINGERPRINT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Codec:
    """How K and V are stored. Widths of 16 and 32 bits mean IEEE floats, without scales.

    codec_id: the number in the block header, 1..255; never reused.
    """

    name: str
    key_bits: int
    value_bits: int
    codec_id: int

    @property
    def key_scales(self) -> bool:
        return self.key_bits <= 8

    @property
    def value_scales(self) -> bool:
        return self.value_bits <= 8


CODECS = {
    codec.name: codec
    for codec in (
        Codec("fp32", 32, 32, 1),
        Codec("fp16", 16, 16, 2),
        Codec("k8v8", 8, 8, 8),
        Codec("k4v4", 4, 4, 3),
        Codec("k4v3", 4, 3, 4),
        Codec("k3v3", 3, 3, 5),
        Codec("k3v2", 3, 2, 6),
        Codec("k2v2", 2, 2, 7),
    )
}


class Planes(NamedTuple):
    """One layer of a block: its codec and where its planes begin, in bytes from the block's start.

    Each plane ends where the next begins, the last at `end`; all are multiples of 64. A float
    codec's scale planes are empty.
    """

    codec: Codec
    key_codes: int
    value_codes: int
    key_scales: int
    value_scales: int
    end: int


def supports_head_dim(head_dim: int) -> bool:
    """Whether blocks can hold vectors of this size: a word of 2-bit codes spans 16 of them."""
    fits = MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and head_dim % 16 == 0
    return fits and has_rotation(head_dim)


def plane_bytes(length: int, lanes: int, bits: int) -> int:
    """Size of one head's codes [length, lanes], length a multiple of 16 (block.py draws them).

    Only the signs of 3-bit codes may need padding: their words span 32 elements.
    """
    if bits == 3:
        return length * lanes // 4 + -(-length // 32) * lanes * 4
    return length * lanes * bits // 8


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Geometry of one model's blocks under one codec, or one codec per layer.

    fingerprint: 16 bytes that say which model (weights, config, centers) the K and V come from.
    layer_codecs: a codec for each layer instead of `codec`; empty if all have that one.
    Raises ValueError naming the field, its value and its limit.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    codec: str
    fingerprint: bytes
    layer_codecs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for codec in (self.codec, *self.layer_codecs):
            if codec not in CODECS:
                raise ValueError(f"codec is {codec!r}, must be one of {', '.join(CODECS)}")
        for name, value in (("num_layers", self.num_layers), ("num_kv_heads", self.num_kv_heads)):
            if not 1 <= value < 1 << 16:
                raise ValueError(f"{name} is {value}, must be in 1..65535")
        if len(self.layer_codecs) not in (0, self.num_layers):
            raise ValueError(
                f"layer_codecs has {len(self.layer_codecs)} codecs, must have {self.num_layers}"
            )
        if not supports_head_dim(self.head_dim):
            raise ValueError(
                f"head_dim is {self.head_dim}, must be a multiple of 16 in "
                f"{MIN_HEAD_DIM}..{MAX_HEAD_DIM} that has a Hadamard matrix"
            )
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(
                f"fingerprint has {len(self.fingerprint)} bytes, must have {FINGERPRINT_BYTES}"
            )
        if set(self.layer_codecs) == {self.codec}:  # one form for one meaning
            object.__setattr__(self, "layer_codecs", ())

    @property
    def spec(self) -> Codec:
        """The codec of the layers that have none of their own."""
        return CODECS[self.codec]

    @property
    def codec_label(self) -> str:
        """Names all codecs, for people and for keys: k4v4, or k4v4+0:k8v8+5:k8v8."""
        own = ((i, name) for i, name in enumerate(self.layer_codecs) if name != self.codec)
        return "+".join((self.codec, *(f"{i}:{name}" for i, name in own)))

    @property
    def table_bytes(self) -> int:
        """Size of the header's table of layers, padded to 64; 0 if all layers are alike."""
        return -(-len(self.layer_codecs) // 64) * 64

    @property
    def header_bytes(self) -> int:
        return HEADER_BYTES + self.table_bytes

    def planes(self, layer: int) -> Planes:
        return _all_planes(self)[layer]

    @property
    def payload_bytes(self) -> int:
        return _all_planes(self)[-1].end - self.header_bytes

    @property
    def block_bytes(self) -> int:
        """Size of a whole block, header and trailer included; a multiple of 64."""
        return _all_planes(self)[-1].end + TRAILER_BYTES


@functools.cache
def _all_planes(layout: KvLayout) -> tuple[Planes, ...]:
    vectors = layout.num_kv_heads * BLOCK_SIZE
    codecs = layout.layer_codecs or (layout.codec,) * layout.num_layers
    at = layout.header_bytes
    layers: list[Planes] = []
    for name in codecs:
        codec = CODECS[name]
        starts = [at]
        for size in (
            layout.num_kv_heads * plane_bytes(layout.head_dim, BLOCK_SIZE, codec.key_bits),
            layout.num_kv_heads * plane_bytes(BLOCK_SIZE, layout.head_dim, codec.value_bits),
            2 * vectors * codec.key_scales,
            2 * vectors * codec.value_scales,
        ):
            starts.append(starts[-1] + size)
        layers.append(Planes(codec, *starts))
        at = starts[-1]
    return tuple(layers)
