"""How many warps of a kernel an SM holds at once, by what the compiler says that it takes.

Limits of an SM from the CUDA Programming Guide's table of technical specifications by compute
capability. Of sm_107a there is no such table yet, so nothing is said of it.
"""

from dataclasses import dataclass

from kvmesh.kernels.cuda.source import PREFILL_WARPS, Unit, attend_shape
from kvmesh.kernels.layout import BLOCK_SIZE

SEAL_WARPS = 8
FINISH_THREADS = 128
CRC_LANES = 256
MOVE_THREADS = 256
_FLOAT = 4  # bytes
_REGISTERS = 65_536  # of an SM, on all of these
_REGISTER_UNIT = 256  # a warp's registers are given in such pieces
_RESERVED_BYTES = 1024  # of shared memory, for each thread block


@dataclass(frozen=True, slots=True)
class SmLimits:
    """warps, thread blocks and bytes of shared memory that one SM holds."""

    warps: int
    blocks: int
    shared_bytes: int


LIMITS = {
    "sm_80": SmLimits(64, 32, 164 << 10),
    "sm_90a": SmLimits(64, 32, 228 << 10),
    "sm_100a": SmLimits(64, 32, 228 << 10),
    "sm_103a": SmLimits(64, 32, 228 << 10),
    "sm_120a": SmLimits(48, 24, 100 << 10),
}


def block_shape(unit: Unit, kernel: str) -> tuple[int, int]:
    """(threads, bytes of shared memory) of one thread block, as the launchers ask for."""
    dim = unit.head_dim
    if kernel in ("attend_decode", "attend_prefill"):
        shape = attend_shape(unit)
        if kernel == "attend_prefill":
            return PREFILL_WARPS * 32, shape.prefill_bytes
        return shape.decode_warps * 32, 2 * shape.decode_warps * shape.ring_bytes
    return {
        "seal_layer": (SEAL_WARPS * 32, SEAL_WARPS * 2 * dim * _FLOAT + BLOCK_SIZE * dim),
        "append_tails": (128, 0),
        "prepare_queries": (128, 4 * 2 * dim * _FLOAT),
        "finish_rows": (FINISH_THREADS, (2 * dim + 2 * BLOCK_SIZE) * _FLOAT),
        "finish_blocks": (CRC_LANES, (1024 + CRC_LANES) * _FLOAT),
        "check_blocks": (CRC_LANES, (1024 + CRC_LANES) * _FLOAT),
        "move_blocks": (MOVE_THREADS, 0),
        "stream_read": (MOVE_THREADS, 0),
        "stream_copy": (MOVE_THREADS, 0),
    }[kernel]


def resident_warps(limits: SmLimits, registers: int, threads: int, shared_bytes: int) -> int:
    """Warps of one SM, when every thread block is alike. registers: of one thread."""
    warps = -(-threads // 32)
    a_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        _REGISTERS // a_warp // warps,
        limits.shared_bytes // (shared_bytes + _RESERVED_BYTES),
    )
    return blocks * warps
