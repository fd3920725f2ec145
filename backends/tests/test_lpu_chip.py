from kvmesh.backends.lpu.chip import LpuChip


def test_published_anchors_hold_exactly() -> None:
    chip = LpuChip(clock_hz=1e9)
    assert chip.peak_int8_ops_per_cycle * chip.clock_hz == 819.2e12
    assert chip.install_cycles == 40
    assert chip.stream_bytes_per_cycle == 20_480
    assert chip.mem_bytes_per_cycle == 56_320
    assert chip.sram_bytes == 220 << 20
