"""The codec in NumPy: the definition of right that every kernel is held against.

For one vector x of head_dim d (fp32 throughout, nothing fused):

    1  x' = x - mu, each element clamped to +-2^20; n2 = sum x'^2
       n2 < 2^-100: all codes 0, scale 0
    2  z = H (signs * x') / sqrt(n2), H unnormalised (rotation.py): the coordinates of a unit
       Gaussian
    3  code_j from z_j, and c_j its level (codebook.py)
    4  keys:   s = (n / sqrt d) / max(a, 1/4), a = sum z_j c_j / d: unbiased inner products
       values: s = (n / sqrt d) / sqrt(e),     e = sum c_j^2 / d: unchanged norm
       s rounded to the nearest fp16, at most 65504
    5  xhat = D H (s c) / sqrt d + mu

A sum over d is added up by halves, element j to element j + d/2, then j + d/4, as long as they
are even; the odd rest from the first to the last.
Beyond the clamps the scale is out of fp16's range (n / sqrt d >= 65536) or rounds to zero anyway.

Sources: TurboQuant (arXiv 2504.19874); the keys' scale is RaBitQ's and EDEN's unbiased one.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvmesh.kernels import codebook, rotation
from kvmesh.kernels.errors import CodecError
from kvmesh.kernels.layout import BLOCK_SIZE, KvLayout

LARGEST = 2.0**20  # of a centered element
SMALLEST_NORM2 = 2.0**-100
WEAKEST = 0.25  # of a, for vectors that lie along a row of H D
MAX_SCALE = 65504.0  # the largest finite fp16

Kind = Literal["key", "value"]
Floats = npt.NDArray[np.float32]
Octets = npt.NDArray[np.uint8]


def _sum_by_halves(x: npt.NDArray[Any]) -> Floats:
    while x.shape[-1] % 2 == 0:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    total = x[..., 0]
    for j in range(1, x.shape[-1]):
        total = total + x[..., j]
    return total


def encode(
    x: Floats, mu: Floats, kind: Kind, bits: int = 4
) -> tuple[Octets, npt.NDArray[np.float16]]:
    """Codes uint8 [n, d] and scales fp16 [n] of vectors x fp32 [n, d] around mu fp32 [d].

    Raises CodecError if x or mu holds a NaN or an infinity.
    """
    if not (np.isfinite(x).all() and np.isfinite(mu).all()):
        raise CodecError(f"{kind}s hold a NaN or an infinity")
    dim = x.shape[-1]
    centered = np.clip(x - mu, np.float32(-LARGEST), np.float32(LARGEST))
    norm2 = _sum_by_halves(centered * centered)
    zero = norm2 < np.float32(SMALLEST_NORM2)
    norm = np.sqrt(np.where(zero, np.float32(0), norm2))
    inverse = np.where(zero, np.float32(0), np.float32(1) / np.where(zero, np.float32(1), norm))
    z = rotation.hadamard(centered * rotation.signs(dim)) * inverse[..., None]
    codes = codebook.quantize(z, bits)
    level = codebook.levels(bits)[codes]
    mean = _sum_by_halves(level * (z if kind == "key" else level)) * np.float32(1 / dim)
    strength = np.maximum(mean, np.float32(WEAKEST)) if kind == "key" else np.sqrt(mean)
    strength[zero] = 1
    scales = np.minimum(norm * np.float32(1 / np.sqrt(dim)) / strength, np.float32(MAX_SCALE))
    codes[zero] = 0
    return codes, scales.astype(np.float16)


def decode(
    codes: Octets, scales: npt.NDArray[np.float16], mu: Floats, bits: int = 4
) -> npt.NDArray[np.float64]:
    """The vectors that codes [..., n, d] and scales [..., n] stand for: fp64, like codes."""
    dim = codes.shape[-1]
    coded = codebook.levels(bits)[codes].astype(np.float64) * scales.astype(np.float64)[..., None]
    x: npt.NDArray[np.float64] = rotation.hadamard(coded) * rotation.signs(dim) / np.sqrt(dim) + mu
    return x


def _pack_words(codes: Octets, width: int) -> Octets:
    """Words of codes [heads, length, lanes] along length (block.py): uint8 [heads, size]."""
    heads, _, lanes = codes.shape
    fields = 8 // width
    shifts = (np.arange(fields) * width)[:, None, None]
    by_field = codes.reshape(heads, -1, fields, 4, lanes).astype(np.int64) << shifts
    octets: Octets = np.bitwise_or.reduce(by_field, axis=2).astype(np.uint8)
    return octets.transpose(0, 1, 3, 2).reshape(heads, -1)  # [heads, words, lanes, 4]


def _unpack_words(plane: Octets, width: int, lanes: int) -> Octets:
    heads = len(plane)
    octets = plane.reshape(heads, -1, lanes, 4).transpose(0, 1, 3, 2)
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None, None]
    codes: Octets = octets[:, :, None] >> shifts & np.uint8((1 << width) - 1)
    return codes.reshape(heads, -1, lanes)


def pack(codes: Octets, bits: int) -> Octets:
    """The plane of codes [heads, length, lanes], in words along length: uint8 [heads, size].

    length: a multiple of 16.
    """
    if bits != 3:
        return _pack_words(codes, bits)
    padded = np.pad(codes >> np.uint8(2), ((0, 0), (0, -codes.shape[1] % 32), (0, 0)))
    return np.concatenate((_pack_words(codes & np.uint8(3), 2), _pack_words(padded, 1)), axis=1)


def unpack(plane: Octets, bits: int, shape: tuple[int, int, int]) -> Octets:
    """The codes of `pack`: uint8 [heads, length, lanes]."""
    heads, length, lanes = shape
    plane = plane.reshape(heads, -1)
    if bits != 3:
        return _unpack_words(plane, bits, lanes)
    border = length * lanes // 4
    signs = _unpack_words(plane[:, border:], 1, lanes)[:, :length]
    return _unpack_words(plane[:, :border], 2, lanes) | signs << np.uint8(2)


def _to_floats(x: Floats, bits: int) -> Octets:
    if not np.isfinite(x).all():
        raise CodecError("K or V hold a NaN or an infinity")
    stored = np.clip(x, -MAX_SCALE, MAX_SCALE).astype(np.float16) if bits == 16 else x
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def seal_layer(
    layout: KvLayout, block: Octets, layer: int, kv: tuple[Floats, Floats], centers: Floats
) -> None:
    """Writes one layer's planes. kv: fp32 [64, Hkv, D] each; centers: fp32 [2, Hkv, D].

    Raises CodecError for a NaN or an infinity.
    """
    at = layout.planes(layer)
    planes: list[Octets] = []
    scale_planes: list[Octets] = []
    kinds: tuple[tuple[Kind, int], ...] = (
        ("key", at.codec.key_bits),
        ("value", at.codec.value_bits),
    )
    for x, mu, (kind, bits) in zip(kv, centers, kinds, strict=True):
        by_head = x.transpose(1, 0, 2)  # [head][token][dim]
        if bits > 8:
            planes.append(
                _to_floats(by_head.transpose(0, 2, 1) if kind == "key" else by_head, bits)
            )
            continue
        codes, scales = encode(by_head, mu[:, None], kind, bits)
        planes.append(pack(codes.transpose(0, 2, 1) if kind == "key" else codes, bits).reshape(-1))
        scale_planes.append(scales.reshape(-1).view(np.uint8))
    block[at.key_codes : at.end] = np.concatenate(planes + scale_planes)


def decode_layer(
    layout: KvLayout, block: Octets, layer: int, centers: Floats
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """K and V of one layer of a sealed block: fp64 [64, Hkv, D] each."""
    at = layout.planes(layer)
    heads, dim = layout.num_kv_heads, layout.head_dim
    decoded: list[npt.NDArray[np.float64]] = []
    for kind, bits, plane, scale_plane in (
        (0, at.codec.key_bits, block[at.key_codes : at.value_codes],
         block[at.key_scales : at.value_scales]),
        (1, at.codec.value_bits, block[at.value_codes : at.key_scales],
         block[at.value_scales : at.end]),
    ):  # fmt: skip
        shape = (heads, BLOCK_SIZE, dim) if kind else (heads, dim, BLOCK_SIZE)
        if bits > 8:
            floats = plane.view(np.float16 if bits == 16 else np.float32).reshape(shape)
            x = (floats if kind else floats.transpose(0, 2, 1)).astype(np.float64)
        else:
            codes = unpack(plane, bits, shape)
            codes = codes if kind else codes.transpose(0, 2, 1)
            scales = scale_plane.view(np.float16).reshape(heads, BLOCK_SIZE)
            x = decode(codes, scales, centers[kind][:, None], bits)
        decoded.append(x.transpose(1, 0, 2))
    return decoded[0], decoded[1]


def attend_reference(
    q: Floats, keys: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Softmax attention in fp64 of one token. q: [Hq, D]; keys, values: [tokens, Hkv, D].

    The caller concatenates the decoded sealed blocks and the fp32 tail. Returns fp64 [Hq, D].
    """
    group = q.shape[0] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = np.einsum("hd,thd->ht", q.astype(np.float64), keys) / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    out: npt.NDArray[np.float64] = np.einsum("ht,thd->hd", weights, values)
    return out
