"""The text of the CUDA kernels with a layout's constants in front of it.

One text serves NVRTC, CuPy and the CPU build that the tests run. What depends on a layer (head_dim,
widths) is a macro; what depends on a step is an argument, read on the device.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kvmesh.kernels import codebook, rotation
from kvmesh.kernels.reference import SMALLEST_NORM2

FOLDER = Path(__file__).parent
CRC_POLYNOMIAL = 0xEDB88320  # of zlib's CRC-32, reflected

ROWS = 16  # query rows of one tile: the M of the matrix instruction
PREFILL_WARPS = 4
MAX_RING_BYTES = 96 << 10  # of one thread block: what every architecture from sm_80 on has

UnitName = Literal["seal", "attend", "blocks", "stream"]
KERNELS: dict[UnitName, tuple[str, ...]] = {
    "seal": ("seal_layer", "append_tails"),
    "attend": ("prepare_queries", "attend_decode", "attend_prefill", "finish_rows"),
    "blocks": ("finish_blocks", "check_blocks", "move_blocks"),
    "stream": ("stream_read", "stream_copy"),
}


@dataclass(frozen=True, slots=True)
class Unit:
    """One translation unit: which kernels, for which head_dim and widths of codes.

    blocks and stream do not depend on head_dim and widths; give zeros.
    """

    name: UnitName
    head_dim: int = 0
    key_bits: int = 0
    value_bits: int = 0

    @property
    def text(self) -> str:
        """The whole program; includes are relative to FOLDER."""
        return f'{_constants(self)}\n#include "{self.name}.cu"\n'

    @property
    def digest(self) -> str:
        """Changes whenever any byte of the program or of a file it may include does."""
        files = sorted(FOLDER.glob("*.cu*"))
        parts = [self.text.encode(), *(path.read_bytes() for path in files)]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


@dataclass(frozen=True, slots=True)
class AttendShape:
    """Sizes that the attention kernels and their launcher agree on.

    ring_bytes: shared memory of one block of one warp; decode_warps: warps of one thread block;
    query_words: 4-byte words of one tile's and head's queries; prefill_bytes: shared memory of a
    prefill's thread block.
    """

    ring_bytes: int
    decode_warps: int
    query_words: int
    prefill_bytes: int


def value_parts(head_dim: int) -> int:
    """Warps that share the dims of the values of one tile and span."""
    return 2 if head_dim > 128 else 1


def attend_shape(unit: Unit) -> AttendShape:
    """The arithmetic of `Chunks` in codes.cuh."""
    dim, chunks, widened = unit.head_dim, 0, 0
    query_words = ROWS * dim
    for kind, bits in enumerate((unit.key_bits, unit.value_bits)):
        elements = 16 if bits == 3 else 8 if bits >= 16 else 32 // bits
        outer = -(-dim // 32) if kind else -(-(dim // elements) // 4)
        outer = -(-outer // value_parts(dim)) if kind else outer
        count = outer * (16 // elements if kind else 2)
        if bits <= 8:
            chunks += count * (2 if bits == 3 else 1)
        if bits <= 16:
            widened = max(widened, count * elements // 2 * 512)
        if kind == 0 and bits != 32:
            query_words = outer * (elements // 4) * 128
    ring = chunks * 512 + 256
    warps = next((n for n in (4, 2) if 2 * n * ring <= MAX_RING_BYTES), 1)
    return AttendShape(ring, warps, query_words, widened)


def _constants(unit: Unit) -> str:
    lines = [f"#define CRC_POLYNOMIAL 0x{CRC_POLYNOMIAL:08x}u", '#include "device.cuh"']
    if unit.head_dim:
        lines += _rotation_lines(unit.head_dim)
        lines += _codebook_lines()
        lines += [f"#define KEY_BITS {unit.key_bits}", f"#define VALUE_BITS {unit.value_bits}"]
        shape = attend_shape(unit)
        lines += [
            f"#define RING_BYTES {shape.ring_bytes}",
            f"#define DECODE_WARPS {shape.decode_warps}",
            f"#define PREFILL_WARPS {PREFILL_WARPS}",
        ]
    return "\n".join(lines)


def _float(value: float) -> str:
    """An fp32 constant, to the last bit."""
    mantissa, exponent = math.frexp(float(np.float32(value)))
    return f"{int(math.ldexp(mantissa, 24))}.0f * {math.ldexp(1.0, exponent - 24)!r}f"


def _bit_words(row: np.ndarray) -> list[int]:
    """Bit j % 32 of word j // 32 says that element j is negative."""
    words = [0] * (-(-len(row) // 32))
    for j, value in enumerate(row.tolist()):
        words[j // 32] |= (value < 0) << (j % 32)
    return words


def _array(kind: str, name: str, values: list[str]) -> str:
    return f"static __device__ const {kind} {name}[] = {{{', '.join(values)}}};"


def _rotation_lines(dim: int) -> list[str]:
    base = rotation.base(dim)
    base_words = [f"0x{word:x}u" for row in base for word in _bit_words(row)]
    signs = [f"0x{word:x}u" for word in _bit_words(rotation.signs(dim))]
    return [
        f"#define DIM {dim}",
        f"#define BASE_ORDER {len(base)}",
        f"#define BASE_WORDS {-(-len(base) // 32)}",
        f"#define INVERSE_DIM ({_float(float(np.float32(1 / dim)))})",
        f"#define INVERSE_ROOT_DIM ({_float(float(np.float32(1 / np.sqrt(dim))))})",
        f"#define SMALLEST_NORM2 ({_float(SMALLEST_NORM2)})",
        _array("uint32_t", "BASE_SIGNS", base_words),
        _array("uint32_t", "ROTATION_SIGNS", signs),
    ]


def _codebook_lines() -> list[str]:
    lines = []
    for name, table in (("thresholds", codebook.thresholds), ("levels", codebook.levels)):
        lines.append(f"template <int bits> static __device__ __forceinline__ float {name}(int i);")
        for bits in (2, 3, 4):
            values = [_float(float(value)) for value in table(bits)]
            lines.append(_array("float", f"{name}_{bits}", values))
            lines.append(
                f"template <> __device__ __forceinline__ float {name}<{bits}>(int i) "
                f"{{ return {name}_{bits}[i]; }}"
            )
        # 8 bits have neither: their codes are steps.
        lines.append(
            f"template <> __device__ __forceinline__ float {name}<8>(int i) {{ return 0.0f; }}"
        )
    for name, bits, first in (
        ("TABLE_2", 2, 0), ("TABLE_3_LOW", 3, 0), ("TABLE_3_HIGH", 3, 4),
        ("TABLE_4_LOW", 4, 0), ("TABLE_4_HIGH", 4, 4),
    ):  # fmt: skip
        word = int.from_bytes(codebook.grid(bits)[first : first + 4].tobytes(), "little")
        lines.append(f"#define {name} 0x{word:08x}u")
    lines.append(
        "template <int bits> static __device__ __forceinline__ float step_of() "
        "{ return bits == 2 ? "
        + " : bits == ".join(f"{bits} ? {_float(codebook.step(bits))}" for bits in (2, 3, 4))[4:]
        + f" : {_float(codebook.step(8))}; }}"
    )
    return lines
