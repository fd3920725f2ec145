"""Whole blocks on a CUDA device: finish, check, gather, scatter, copy."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kernels import block
from kvmesh.kernels.cuda.device import Device
from kvmesh.kernels.cuda.occupancy import CRC_LANES, MOVE_THREADS, block_shape
from kvmesh.kernels.cuda.plan import DevicePlan
from kvmesh.kernels.cuda.source import CRC_POLYNOMIAL, Unit
from kvmesh.kernels.errors import ChecksumMismatch
from kvmesh.kernels.layout import KvLayout

UNIT = Unit("blocks")
_ONE = 1 << 31  # the polynomial 1, reflected


def _multiply(a: int, b: int) -> int:
    """The product modulo the checksum's polynomial, all reflected: bit 31 is x^0."""
    product = 0
    for i in range(31, -1, -1):
        if a >> i & 1:
            product ^= b
        b = b >> 1 ^ (CRC_POLYNOMIAL if b & 1 else 0)
    return product


def _power(exponent: int) -> int:
    """x^exponent modulo the polynomial."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        exponent >>= 1
    return result


@functools.cache
def checksum_tables() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """(advance uint32 [4, 256], joins uint32 [9]) of `checksum` in blocks.cu."""
    far = _power(32 * CRC_LANES)
    advance = [[_multiply(byte << 8 * i, far) for byte in range(256)] for i in range(4)]
    return np.array(advance, np.uint32), np.array([_power(32 << k) for k in range(9)], np.uint32)


class BlockTools:
    """Blocks of one layout. Pools and staging memory: device uint8 [n, layout.block_bytes]."""

    def __init__(self, device: Device, layout: KvLayout) -> None:
        self._device = device
        self._bytes = layout.block_bytes
        template = np.zeros(layout.block_bytes, np.uint8)
        block.finish(layout, template)
        self._header = device.put(template[: layout.header_bytes].copy())
        self._advance, self._joins = (device.put(table) for table in checksum_tables())

    def finish(self, pool: Any, plan: DevicePlan) -> None:
        """Header, trailer and checksum of the blocks that the plan fills."""
        args = (
            pool, np.int64(self._bytes), self._header, np.int32(self._header.size), plan.tables,
            np.int32(plan.grid.table_width), plan.filled, plan.num_filled, plan.bad,
            self._advance, self._joins,
        )  # fmt: skip
        grid = (plan.grid.filled, 1, 1)
        self._launch("finish_blocks", grid, args)

    def verify(self, pool: Any, ids: npt.ArrayLike) -> None:
        """Checks blocks where they are. Raises ChecksumMismatch naming the first that is wrong."""
        wanted = np.atleast_1d(np.asarray(ids, np.int32))
        found = self._device.zeros((len(wanted), 2), np.uint32)
        args = (
            pool, np.int64(self._bytes), self._device.put(wanted), np.int32(len(wanted)), found,
            self._advance, self._joins,
        )  # fmt: skip
        grid = (len(wanted), 1, 1)
        self._launch("check_blocks", grid, args)
        sums = self._device.get(found)
        for block_id, (computed, carried) in zip(wanted, sums.tolist(), strict=True):
            if computed != carried:
                raise ChecksumMismatch(
                    f"block {block_id}: checksum is {computed:#010x}, expected {carried:#010x}"
                )

    def move(self, target: Any, to: npt.ArrayLike, source: Any, come_from: npt.ArrayLike) -> None:
        """target[to[i]] = source[come_from[i]]: gathers, scatters or copies whole blocks."""
        to_ids, from_ids = (np.atleast_1d(np.asarray(ids, np.int32)) for ids in (to, come_from))
        if len(to_ids) != len(from_ids):
            raise ValueError(f"{len(from_ids)} blocks to {len(to_ids)} places")
        for name, ids, limit in (("to", to_ids, len(target)), ("from", from_ids, len(source))):
            if len(ids) and not (ids.min() >= 0 and ids.max() < limit):
                raise ValueError(
                    f"block ids {name} {ids.min()}..{ids.max()} are not in [0, {limit})"
                )
        if not len(to_ids):
            return
        args = (
            target, self._device.put(to_ids), source, self._device.put(from_ids),
            np.int32(len(to_ids)), np.int64(self._bytes),
        )  # fmt: skip
        slices = max(1, min(32, self._bytes // (16 * MOVE_THREADS * 4)))
        self._launch("move_blocks", (len(to_ids), slices, 1), args)

    def _launch(self, kernel: str, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        self._device.launch(UNIT, kernel, grid, *block_shape(UNIT, kernel), args)
