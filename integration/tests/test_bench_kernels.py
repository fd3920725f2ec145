"""The bench of kernels: its rows, its error against fp64, and rivals that compute the same."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from kvmesh.cli.main import app
from kvmesh.integration.bench_kernels import (
    Clock,
    KernelCase,
    Prepared,
    Timed,
    bench_kernels,
    cases,
    ratios,
)
from kvmesh.integration.bench_kernels_cpu import CpuKernels, make_data
from kvmesh.integration.bench_rivals import Rivals
from kvmesh.integration.kernels_plot import kernels_plot

TINY = KernelCase("decode", "k4v4", 192, batch=2, group=2, kv_heads=2, head_dim=64, threads=2)


class Scripted:
    """A backend whose every run takes the seconds that it says, on the clock that it moves."""

    machine = "scripted"
    missing = ("nothing",)

    def __init__(self) -> None:
        self.seconds = 0.0
        self.runs: list[str] = []

    def now(self) -> float:
        return self.seconds

    def _timed(self, name: str, width: int, moved: int, seconds: float) -> Timed:
        def run() -> None:
            self.runs.append(name)
            self.seconds += seconds

        return Timed(name, width, moved, run)

    def bandwidths(self, threads: int) -> list[Timed]:
        return [self._timed("read", 0, 10 * 10**9, 1.0), self._timed("copy", 0, 10**9, 1.0)]

    def prepare(self, case: KernelCase) -> Prepared:
        rivals = [
            self._timed("full", 32, 10**9, 4.0),
            self._timed("slow", 32, 10**9, 40.0),
            self._timed("half", 16, 10**9, 1.0),
        ]
        return Prepared(self._timed("ours", 0, 10**9, 0.5), rivals, lambda: 1e-6)


def test_rows_say_what_the_clock_said():
    backend = Scripted()
    clock = Clock(backend.now, lambda: None)
    report = bench_kernels(backend, [TINY], 20, clock, lambda: None)
    assert report.read_gb_per_s == 10 and report.copy_gb_per_s == 1
    full, slow, half = report.rows
    assert (full.baseline, full.ratio, full.fastest) == ("full", 8.0, True)
    assert (slow.ratio, slow.fastest, slow.baseline_repetitions) == (80.0, False, 3)
    assert (half.ratio, half.fastest, half.baseline_repetitions) == (2.0, True, 20)
    assert full.gb_per_s == 2 and full.read_share == 0.2 and full.repetitions == 20
    (one,) = ratios(report.rows)
    assert one.fp32 == full and one.half == half
    # They take turns: no two runs of one follow each other after the first look.
    turns = backend.runs[12:]
    assert all(a != b for a, b in itertools.pairwise(turns))
    assert "kvmesh k4v4" in kernels_plot(report) and "half" in kernels_plot(report)


def test_nothing_to_measure_or_to_draw_is_refused():
    backend = Scripted()
    clock = Clock(backend.now, lambda: None)
    with pytest.raises(ValueError, match="no case to measure"):
        bench_kernels(backend, [], 20, clock, lambda: None)
    (seal,) = cases(["seal"], ["k4v4"], [64], KernelCase("seal", "", 0, threads=1))
    report = bench_kernels(backend, [seal], 1, clock, lambda: None)
    with pytest.raises(ValueError, match="no decode was measured"):
        kernels_plot(report)


@pytest.mark.parametrize("codec", ["k4v4", "k3v2", "k8v8"])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_our_output_is_fp64_attention_on_the_same_codes(op, codec):
    ready = CpuKernels().prepare(replace(TINY, op=op, codec=codec))
    error = ready.error()
    assert error is not None and error <= 2e-4
    ready.subject.run()


def test_rivals_compute_attention():
    data = make_data(TINY, 96, 1)
    q = data.q.astype(np.float64).reshape(2, 2, 2, 64)
    scores = np.einsum("bhgd,bhtd->bhgt", q, data.k) / 8
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    want = np.einsum("bhgt,bhtd->bhgd", weights, data.v).reshape(-1)
    found = Rivals().attention(data.q, data.k, data.v, 2)
    assert {rival.width for rival in found} >= {32}
    for rival in found:
        out = rival.run()
        out = out.float().numpy() if hasattr(out, "float") else out
        error = np.linalg.norm(np.asarray(out, np.float64).reshape(-1) - want)
        limit = 1e-5 if rival.width == 32 else 2e-2
        assert error <= limit * np.linalg.norm(want), rival.name


def test_the_command_prints_rows_and_draws(tmp_path):
    picture = tmp_path / "speed.svg"
    arguments = [
        "--contexts",
        "128",
        "--codecs",
        "k4v4",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments, "--plot", str(picture)])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {row["op"] for row in found["rows"]} == {"decode", "seal", "prefill"}
    assert all(row["seconds"] > 0 and row["baseline_seconds"] > 0 for row in found["rows"])
    assert all(row["error"] <= 2e-3 for row in found["rows"] if row["op"] != "seal")
    assert found["read_gb_per_s"] > 0
    assert "kvmesh k4v4" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "abacus"], "kernels can be measured of: cpu"),
        (["--ops", "guess"], "must be one of decode, seal, prefill"),
        (["--codecs", "fp16"], "must be one of k8v8"),
        (["--contexts", "100"], "must be a multiple of 64"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
