"""`kvmesh bench kernels --backend cuda`, on the device that the CPU stands in for."""

from dataclasses import replace

import numpy as np
import pytest
from cuda_shim import ShimDevice
from typer.testing import CliRunner

from kvmesh.backends.errors import BackendUnavailable
from kvmesh.cli.main import app
from kvmesh.integration import bench_kernels_cuda
from kvmesh.integration.bench_kernels import KernelCase, Timed, bench_kernels
from kvmesh.integration.bench_kernels_cuda import CudaKernels, attend_repeated, open_cuda_kernels
from kvmesh.integration.bench_kernels_torch import NoRivals, open_torch
from kvmesh.kernels.cuda.device import Place

SHAPE = KernelCase("decode", "k4v4", 512, batch=2, group=4, kv_heads=2, head_dim=64)
STREAM = 1 << 16


class OneRival(NoRivals):
    def decode(self, case):
        return [Timed("nothing", 16, 1, lambda: None)]

    prefill = decode


@pytest.mark.parametrize("codec", ["k4v4", "k3v3"])
def test_decode_is_right_and_counts_what_it_reads(codec):
    kernels = CudaKernels(ShimDevice(), OneRival("none"), STREAM)
    case = replace(SHAPE, codec=codec)
    ready = kernels.prepare(case)
    ready.subject.run()
    error = ready.error()
    assert error is not None and 0 < error <= 2e-3
    bits = 8 if codec == "k4v4" else 6
    vectors = 2 * 512 * 2
    assert ready.subject.moved == vectors * (64 * bits // 8 + 4)  # codes, and two fp16 scales


def test_prefill_is_right_and_seals_its_blocks_first():
    kernels = CudaKernels(ShimDevice(), OneRival("none"), STREAM)
    case = KernelCase("prefill", "k4v4", 128, batch=1, group=1, kv_heads=1, head_dim=64)
    ready = kernels.prepare(case)
    error = ready.error()
    assert error is not None and 0 < error <= 2e-3


def test_a_report_has_every_row_and_the_devices_bandwidth():
    kernels = CudaKernels(ShimDevice(), OneRival("none"), STREAM)
    cases = [SHAPE, KernelCase("seal", "k4v4", 128, kv_heads=1, head_dim=64)]
    report = bench_kernels(kernels, cases, 2, kernels.clock(), lambda: None)
    assert [(row.op, row.baseline) for row in report.rows] == [
        ("decode", "nothing"), ("seal", "copy of the input"),
    ]  # fmt: skip
    assert report.read_gb_per_s > 0 and report.copy_gb_per_s > 0
    assert report.machine.startswith("CUDA text on the CPU") and report.missing == ["none"]


def test_attention_over_repeated_blocks_is_attention_over_all_of_them():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((4, 32))
    kv = rng.standard_normal((2, 3, 64, 2, 32))
    own = rng.standard_normal((2, 2, 32))
    times = np.array([2, 0, 1])
    found = attend_repeated(q, (kv[0], kv[1]), times, (own[0], own[1]))
    keys, values = (
        np.concatenate([*(kv[kind, i] for i in (0, 2, 0)), own[kind][None]]) for kind in range(2)
    )
    for head in range(4):
        weights = np.exp(keys[:, head // 2] @ q[head] / np.sqrt(32))
        expected = weights @ values[:, head // 2] / weights.sum()
        assert np.abs(found[head] - expected).max() < 1e-12


def test_torchs_implementations_are_rivals_and_those_that_refuse_are_told():
    pytest.importorskip("torch")
    rivals = open_torch(Place("cpu"))
    case = KernelCase("decode", "k4v4", 256, batch=2, group=4, kv_heads=2, head_dim=64)
    decode = rivals.decode(case)
    assert {rival.width for rival in decode} == {16, 32}
    assert {rival.moved for rival in decode if rival.width == 16} == {2 * 2 * 2 * 257 * 64 * 2}
    assert any("packed" in rival.name for rival in decode)
    for rival in decode:
        assert rival.run().shape[-1] == 64
    assert any("cudnn_attention" in reason for reason in rivals.missing)


def test_packed_and_grouped_queries_are_the_same_attention():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 3, 50, 64)
    q = torch.randn(2, 12, 1, 64)
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = attend(q, k, v, enable_gqa=True)
    packed = attend(q.reshape(2, 3, 4, 64), k, v)
    assert torch.allclose(packed.reshape(2, 12, 1, 64), grouped, atol=1e-6)


def test_without_a_gpu_the_reason_and_the_next_step_are_told(monkeypatch):
    monkeypatch.setattr(bench_kernels_cuda, "unavailable_reason", lambda: "no GPU is here; do this")
    with pytest.raises(BackendUnavailable, match="cannot run here: no GPU is here; do this"):
        open_cuda_kernels()
    result = CliRunner().invoke(app, ["bench", "kernels", "--backend", "cuda", "--quick"])
    assert result.exit_code == 2 and result.stdout == ""
    assert "no GPU is here; do this" in " ".join(result.stderr.split())
    if open_torch(Place("cuda")).missing:
        assert "torch" in open_torch(Place("cuda")).missing[0]
