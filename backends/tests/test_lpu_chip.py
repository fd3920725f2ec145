from dataclasses import replace

import pytest

from kvmesh.backends.devices import load_device
from kvmesh.backends.errors import DeviceError
from kvmesh.backends.lpu.chip import LpuChip
from kvmesh.backends.lpu.compile import CHIP


def test_published_anchors_hold_exactly() -> None:
    chip = replace(CHIP, clock_hz=1e9)
    assert chip.peak_int8_ops_per_cycle * chip.clock_hz == 819.2e12
    assert chip.install_cycles == 40
    assert chip.stream_bytes_per_cycle == 20_480
    assert chip.mem_bytes_per_cycle == 56_320
    assert chip.sram_bytes == 220 << 20


def test_the_chip_is_that_of_its_device_file() -> None:
    device = load_device("lpu-v1")
    assert LpuChip.of(device) == CHIP
    assert CHIP.sram_bytes == device.memory.bytes.value
    assert CHIP.link_bytes_s == 15e9 and CHIP.local_links == 7  # 4 lanes of 30 Gb/s
    assert CHIP.stream_bytes_per_cycle * CHIP.clock_hz == device.memory.bandwidth_bytes_s.value
    with pytest.raises(DeviceError, match=r"device b200: chip is missing"):
        LpuChip.of(load_device("b200"))
