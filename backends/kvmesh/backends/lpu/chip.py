"""One LPU chip as its compiler sees it: sizes, rates and places, all fixed, nothing adaptive.

Its figures are in devices/lpu-v1.toml with their sources; defaults here are the compiler's choices.
"""

import math
from dataclasses import dataclass
from typing import Self

from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import DeviceError

EAST, WEST = 1, -1  # direction of a stream, in hops per cycle


@dataclass(frozen=True, slots=True)
class LpuChip:
    """Sizes and rates of one chip; bytes are per chip and per cycle unless named otherwise.

    weight_streams: outward streams of each hemisphere that feed its MXM's weight port. With all 32
    it would be twice as fast; the published 40 cycles for four planes are met by 16.
    stagger_cycles: an instruction climbs one superlane per cycle, so a result is whole 20 cycles
    after its operands. mxm_pipeline_cycles: on top of that, through the array and accumulators.
    """

    clock_hz: float
    superlanes: int
    lanes_per_superlane: int
    mem_slices: int
    mem_slice_bytes: int
    streams_per_direction: int
    mxm_planes: int
    weight_streams: int
    vxm_alus: int  # per lane
    stagger_cycles: int
    mxm_pipeline_cycles: int
    mem_cycles: int
    link_bytes_s: float  # one direction of one link
    hop_s: float  # chip to chip, first byte
    local_links: int  # to the others of a fully connected node
    work_slices: int = 12  # of each hemisphere, nearest the VXM, for what a program computes
    work_vectors: int = 1024  # of each of those that weights and cache must leave free

    @classmethod
    def of(cls, device: Device) -> Self:
        """Raises DeviceError if the device has no such chip."""
        chip, up = device.chip, device.scale_up
        if chip is None or up.latency_s is None:
            raise DeviceError(
                f"device {device.name}: {'chip' if chip is None else 'scale_up.latency_s'} is "
                "missing, which compiling for it needs"
            )
        whole = ("clock_hz", "links")
        return cls(
            clock_hz=chip.clock_hz.value,
            link_bytes_s=up.bandwidth_bytes_s.value / chip.links.value,
            hop_s=up.latency_s.value,
            local_links=device.domain - 1,
            **{
                name: int(getattr(chip, name).value)
                for name in type(chip).model_fields
                if name not in whole
            },
        )

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector: one INT8 value per lane."""
        return self.superlanes * self.lanes_per_superlane

    @property
    def sram_bytes(self) -> int:
        return self.mem_slices * self.mem_slice_bytes

    @property
    def data_bytes(self) -> int:
        """For weights and cache."""
        return self.sram_bytes - 2 * self.work_slices * self.work_vectors * self.vector_bytes

    def room_to_work(self, data_bytes: int) -> int:
        """Vectors left to a program in each work slice; data goes to the other slices first."""
        others = (self.mem_slices - 2 * self.work_slices) * self.mem_slice_bytes
        spilt = max(0, data_bytes - others) / (2 * self.work_slices * self.vector_bytes)
        return self.slice_vectors - math.ceil(spilt)

    @property
    def slice_vectors(self) -> int:
        return self.mem_slice_bytes // self.vector_bytes

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
    def install_bytes_per_cycle(self) -> int:
        """What the weight ports of both hemispheres take."""
        return 2 * self.weight_streams * self.vector_bytes

    @property
    def install_cycles(self) -> int:
        """Cycles to install INT8 weights in all planes."""
        weights = self.mxm_planes * self.vector_bytes**2
        return -(-weights // self.install_bytes_per_cycle)

    @property
    def node_chips(self) -> int:
        return self.local_links + 1

    @property
    def link_vector_cycles(self) -> int:
        """Cycles that a link is taken by one vector."""
        return math.ceil(self.vector_bytes * self.clock_hz / self.link_bytes_s)

    @property
    def hop_cycles(self) -> int:
        return round(self.hop_s * self.clock_hz)

    @property
    def hemisphere_slices(self) -> int:
        return self.mem_slices // 2

    @property
    def positions(self) -> int:
        """Places along the streams: MXM C2C SXM MEM.. VXM MEM.. SXM C2C MXM."""
        return self.mem_slices + 7

    def position(self, unit: str) -> int:
        """Place of a unit, counted in hops from the west end.

        unit: "VXM", or "MXM", "C2C", "SXM" or "MEM" followed by "_E" or "_W"; MEM also by its
        number counted from the VXM outwards, as in "MEM_W7". Raises ValueError for another name.
        """
        middle = self.hemisphere_slices + 3
        if unit == "VXM":
            return middle
        kind, _, place = unit.partition("_")
        side = {"E": EAST, "W": WEST}.get(place[:1], 0)
        number = int(place[1:]) if kind == "MEM" and place[1:].isdecimal() else 0
        beyond = {"SXM": 1, "C2C": 2, "MXM": 3}
        if not side or number >= self.hemisphere_slices or kind not in ("MEM", *beyond):
            raise ValueError(f"the chip has no unit {unit!r}")
        if kind == "MEM":
            return middle + side * (1 + number)
        return middle + side * (self.hemisphere_slices + beyond[kind])
