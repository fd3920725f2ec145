"""Where a shard's blocks lie: in main memory, or in a device's with main memory behind it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmesh.kernels.layout import KvLayout


@dataclass(slots=True, eq=False)
class HeldBlock:
    """One block, in exactly one of three places.

    data: in main memory. slot: on the device. pending: on its way from there to main memory; the
    future's result is its bytes. None of them: the device lost it. freed: nobody asks for it again.
    """

    size: int
    data: bytes | None
    slot: int | None = None
    pending: "asyncio.Future[bytes | None] | None" = None
    freed: bool = False

    def __len__(self) -> int:
        return self.size


class BlockMemory(Protocol):
    """Methods are called on the event loop."""

    @property
    def device_bytes(self) -> int:
        """Bytes of blocks on a device now."""
        ...

    def hold(self, data: bytes) -> HeldBlock:
        """Takes a verified block, without copying it anywhere yet."""
        ...

    async def settle(self, block: HeldBlock, layout: KvLayout) -> None:
        """Puts it where it is to stay."""
        ...

    async def read(self, blocks: Sequence[HeldBlock]) -> list[bytes | None]:
        """None for a block that the memory lost. The bytes are not verified."""
        ...

    def free(self, block: HeldBlock) -> None:
        """Its memory may be used for others; reads that began before still get its bytes."""
        ...

    async def close(self) -> None: ...


class HostMemory:
    """Main memory alone."""

    device_bytes = 0

    def hold(self, data: bytes) -> HeldBlock:
        return HeldBlock(len(data), data)

    async def settle(self, block: HeldBlock, layout: KvLayout) -> None:
        pass

    async def read(self, blocks: Sequence[HeldBlock]) -> list[bytes | None]:
        return [block.data for block in blocks]

    def free(self, block: HeldBlock) -> None:
        block.freed = True

    async def close(self) -> None:
        pass
