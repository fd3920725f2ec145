"""One LPU chip as its compiler sees it: sizes and rates, all fixed, nothing adaptive.

Figures of the first LPU (the Tensor Streaming Processor), as published in "Think Fast" (ISCA 2020).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LpuChip:
    """Sizes and rates of one chip; bytes are per chip and per cycle unless named otherwise."""

    clock_hz: float = 0.9e9
    superlanes: int = 20
    lanes_per_superlane: int = 16
    mem_slices: int = 88
    mem_slice_bytes: int = 5 << 19  # 2.5 MiB
    streams_per_direction: int = 32
    mxm_planes: int = 4

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector: one INT8 value per lane."""
        return self.superlanes * self.lanes_per_superlane

    @property
    def sram_bytes(self) -> int:
        return self.mem_slices * self.mem_slice_bytes

    @property
    def mem_bytes_per_cycle(self) -> int:
        """Each slice reads one vector and writes one vector in each cycle."""
        return self.mem_slices * 2 * self.vector_bytes

    @property
    def stream_bytes_per_cycle(self) -> int:
        """Both directions together."""
        return 2 * self.streams_per_direction * self.vector_bytes

    @property
    def peak_int8_ops_per_cycle(self) -> int:
        """A multiply-accumulate counts as two operations."""
        return 2 * self.mxm_planes * self.vector_bytes**2

    @property
    def install_cycles(self) -> int:
        """Cycles to install the weights of all planes over the streams of one direction."""
        weights = self.mxm_planes * self.vector_bytes**2
        return -(-weights // (self.streams_per_direction * self.vector_bytes))
