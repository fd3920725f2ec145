"""Where things lie in a sealed block (see block.py for the bytes)."""

from dataclasses import dataclass

BLOCK_SIZE = 64  # tokens; the same in every process of every mesh, part of the block format
HEADER_BYTES = 64
TRAILER_BYTES = 64  # keeps blocks and planes on cache lines; its last 4 bytes are the checksum
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256
FINGERPRINT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Codec:
    """How K and V are stored. Widths of 16 and 32 bits mean IEEE floats, without scales.

    codec_id: the number in the block header; never reused.
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
    for codec in (Codec("fp32", 32, 32, 1), Codec("fp16", 16, 16, 2), Codec("k4v4", 4, 4, 3))
}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Geometry of one model's blocks under one codec.

    fingerprint: 16 bytes that say which model (weights, config, centers) the K and V come from.
    Offsets are bytes from the start of the block, all multiples of 64.
    Raises ValueError naming the field, its value and its limit.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    codec: str
    fingerprint: bytes

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec is {self.codec!r}, must be one of {', '.join(CODECS)}")
        for name, value in (("num_layers", self.num_layers), ("num_kv_heads", self.num_kv_heads)):
            if not 1 <= value < 1 << 16:
                raise ValueError(f"{name} is {value}, must be in 1..65535")
        dim = self.head_dim
        if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM or dim & (dim - 1):
            raise ValueError(
                f"head_dim is {dim}, must be a power of two in {MIN_HEAD_DIM}..{MAX_HEAD_DIM}"
            )
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(
                f"fingerprint has {len(self.fingerprint)} bytes, must have {FINGERPRINT_BYTES}"
            )

    @property
    def spec(self) -> Codec:
        return CODECS[self.codec]

    @property
    def header_bytes(self) -> int:
        return HEADER_BYTES

    @property
    def key_code_bytes(self) -> int:
        """Size of one layer's K codes: [head][dim][token], packed along tokens."""
        return self.num_kv_heads * BLOCK_SIZE * self.head_dim * self.spec.key_bits // 8

    @property
    def value_code_bytes(self) -> int:
        """Size of one layer's V codes: [head][token][dim], packed along dims."""
        return self.num_kv_heads * BLOCK_SIZE * self.head_dim * self.spec.value_bits // 8

    @property
    def key_scale_bytes(self) -> int:
        """Size of one layer's K scales: fp16 [head][token]; 0 for a float codec."""
        return self.num_kv_heads * BLOCK_SIZE * 2 * self.spec.key_scales

    @property
    def value_scale_bytes(self) -> int:
        """Size of one layer's V scales: fp16 [head][token]; 0 for a float codec."""
        return self.num_kv_heads * BLOCK_SIZE * 2 * self.spec.value_scales

    @property
    def layer_bytes(self) -> int:
        codes = self.key_code_bytes + self.value_code_bytes
        return codes + self.key_scale_bytes + self.value_scale_bytes

    @property
    def payload_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def block_bytes(self) -> int:
        """Size of a whole block, header and trailer included; a multiple of 64."""
        return HEADER_BYTES + self.payload_bytes + TRAILER_BYTES

    def key_codes_at(self, layer: int) -> int:
        return HEADER_BYTES + layer * self.layer_bytes

    def value_codes_at(self, layer: int) -> int:
        return self.key_codes_at(layer) + self.key_code_bytes

    def key_scales_at(self, layer: int) -> int:
        return self.value_codes_at(layer) + self.value_code_bytes

    def value_scales_at(self, layer: int) -> int:
        return self.key_scales_at(layer) + self.key_scale_bytes
