"""What only the CPU backend promises: its pool's size, its clock, its memory figures."""

from itertools import count

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvmesh.backends.base import BlockPool, Model, ModelOptions, Segment
from kvmesh.backends.cpu import memory
from kvmesh.backends.cpu.model import CpuModel
from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.loader import load_checkpoint


def test_fits_the_protocols(checkpoint):
    model = CpuModel(load_checkpoint(checkpoint.folder), ModelOptions(num_blocks=4))
    assert isinstance(model, Model)
    assert isinstance(model.pool, BlockPool)


def test_pool_takes_what_full_sequences_need_and_no_more(checkpoint):
    loaded = load_checkpoint(checkpoint.folder)
    assert CpuModel(loaded, ModelOptions()).pool.num_blocks == 64 * 512 // 64
    assert CpuModel(loaded, ModelOptions(memory_fraction=0.0)).pool.num_blocks == 1


def test_warm_up_leaves_no_trace_in_the_pool(checkpoint):
    pool = CpuModel(load_checkpoint(checkpoint.folder), ModelOptions(num_blocks=8)).pool
    assert not pool.blocks.any() and not pool.tails.any()
    assert pool.blocks.ctypes.data % 64 == 0


def test_estimate_rests_on_the_clock_it_was_given(checkpoint):
    ticks = count(0, 7.0)
    loaded = load_checkpoint(checkpoint.folder)
    model = CpuModel(loaded, ModelOptions(num_blocks=8), clock=lambda: next(ticks))
    step = [Segment(0, 0, np.array([5]), np.zeros(1, np.int32))]
    for _ in range(40):
        model.forward(step)
    assert model.estimate().base_s > 1.0  # every step took seven seconds by that clock


def test_weights_that_are_not_finite_are_refused(checkpoint, tmp_path):
    tensors = load_file(checkpoint.folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no finite K and V"):
        CpuModel(load_checkpoint(tmp_path), ModelOptions(num_blocks=8))


def test_machine_without_proc_has_defaults(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "_CPUINFO", tmp_path / "none")
    assert memory.memory_bytes("MemTotal", 5) == 5
    assert memory.processor_name()


def test_memory_fields_are_bytes(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:       16 kB\nMemAvailable:   8 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert memory.memory_bytes("MemAvailable", 0) == 8192
    assert memory.memory_bytes("SwapTotal", 3) == 3
