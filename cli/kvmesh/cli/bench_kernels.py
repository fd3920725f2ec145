"""`kvmesh bench kernels`: how fast compressed attention is beside uncompressed."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kvmesh.cli.errors import USAGE, CommandFailed
from kvmesh.cli.options import Json, command
from kvmesh.cli.progress import progress_bar
from kvmesh.cli.render import console, print_json, print_table

if TYPE_CHECKING:
    from kvmesh.integration.bench_kernels import (
        KernelBackend,
        KernelReport,
        KernelRow,
        Stopwatch,
    )

_Name = TypeVar("_Name", bound=str)

# OpenBLAS lets a thread that has nothing to do spin for 2**26 cycles, other runtimes for less.
_REST_S = 0.04

Backend = Annotated[str, typer.Option(help="Whose kernels: cpu or cuda.")]
Ops = Annotated[str, typer.Option(help="decode, seal and prefill, comma-separated.")]
Codecs = Annotated[str, typer.Option(help="Comma-separated.")]
Contexts = Annotated[str, typer.Option(help="Sealed tokens before the queries, comma-separated.")]
Threads = Annotated[int, typer.Option(min=1, help="For ours and for the others, on the CPU.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences.")]
Rounds = Annotated[int, typer.Option(min=1, help="Runs of each; medians are shown.")]
Quick = Annotated[bool, typer.Option("--quick", help="The shortest context, three runs of each.")]
Plot = Annotated[Path | None, typer.Option(help="Write speed against context to this SVG file.")]


@command
def kernels(
    backend: Backend = "cpu",
    ops: Ops = "decode,seal,prefill",
    codecs: Codecs = "k4v4,k3v3",
    contexts: Contexts = "4096,32768,131072",
    threads: Threads = 2,
    batch: Batch = 1,
    rounds: Rounds = 20,
    quick: Quick = False,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Decode and prefill attention, and sealing, beside PyTorch, ONNX Runtime and NumPy.

    Ours and the others take turns in one run, and so does a streaming read of memory. Eight KV
    heads of 128, four query heads each. What is not installed is named and left out.
    """
    from kvmesh.integration.bench_kernels import OPS, KernelCase, bench_kernels, cases
    from kvmesh.integration.kernels_plot import kernels_plot

    lengths = _contexts(contexts)
    if quick:
        lengths, rounds = [min(lengths)], 3
    shape = KernelCase("decode", "", 0, batch=batch, threads=1 if backend == "cuda" else threads)
    wanted = cases(_chosen("op", ops, OPS), _chosen("codec", codecs, _coded()), lengths, shape)
    measured, clock = _backend(backend)
    with progress_bar("bench", len(wanted), hidden=json) as advance:
        report = bench_kernels(measured, wanted, rounds, clock, advance)
    if plot:
        plot.write_text(kernels_plot(report))
    if json:
        print_json({"benchmark": "kernels", "backend": backend, **asdict(report)})
        return
    _print_report(report)


def _backend(name: str) -> "tuple[KernelBackend, Stopwatch]":
    """Raises BackendUnavailable, with the next step, for a device that is not here."""
    import time

    if name == "cuda":
        from kvmesh.integration.bench_kernels_cuda import open_cuda_kernels

        on_gpu = open_cuda_kernels()
        return on_gpu, on_gpu.clock()
    if name != "cpu":
        raise CommandFailed(f"backend is {name!r}, kernels can be measured of: cpu, cuda", USAGE)
    from kvmesh.integration.bench_kernels import Clock
    from kvmesh.integration.bench_kernels_cpu import CpuKernels

    measured = CpuKernels()

    def rest() -> None:
        time.sleep(_REST_S)
        measured.empty_caches()

    return measured, Clock(time.perf_counter, rest)


def _coded() -> list[str]:
    from kvmesh.kernels.layout import CODECS

    return [name for name, codec in CODECS.items() if codec.key_scales]


def _chosen(what: str, given: str, known: Sequence[_Name]) -> list[_Name]:
    """The names in a comma-separated list, each one of those known."""
    by_name = {str(name): name for name in known}
    for name in given.split(","):
        if name not in by_name:
            raise CommandFailed(f"{what} is {name!r}, must be one of {', '.join(by_name)}", USAGE)
    return [by_name[name] for name in given.split(",")]


def _contexts(given: str) -> list[int]:
    """Whole blocks of tokens."""
    from kvmesh.kernels.layout import BLOCK_SIZE

    for part in given.split(","):
        if not part.isdigit() or not int(part) or int(part) % BLOCK_SIZE:
            raise CommandFailed(f"context is {part!r}, must be a multiple of {BLOCK_SIZE}", USAGE)
    return [int(part) for part in given.split(",")]


def _print_report(report: "KernelReport") -> None:
    from kvmesh.integration.bench_kernels import ratios

    console().print(report.machine)
    console().print(
        f"streaming read {report.read_gb_per_s:.1f} GB/s, copy {report.copy_gb_per_s:.1f} GB/s "
        "(bytes read and written)"
    )
    for line in report.missing:
        console().print(f"not measured: {line}")
    _print_rows(report.rows)
    console().print()
    print_table(
        "beside the fastest installed",
        ("op", "codec", ">context", ">threads", ">x fp32", "fp32", ">x 16-bit", "16-bit"),
        [
            (
                one.op, one.codec, f"{one.context:,}", one.threads,
                *_versus(one.fp32), *_versus(one.half),
            )
            for one in ratios(report.rows)
        ],
    )  # fmt: skip


def _versus(row: "KernelRow | None") -> tuple[str, str]:
    return (f"{row.ratio:.2f}", row.baseline) if row else ("", "")


def _print_rows(rows: "Sequence[KernelRow]") -> None:
    columns = (
        "op", "codec", ">context", ">threads", ">time", ">GB/s", ">of read", ">error", "beside",
        ">its time", ">its GB/s", ">ratio",
    )  # fmt: skip
    print_table(
        "",
        columns,
        [
            (
                row.op,
                row.codec,
                f"{row.context:,}",
                row.threads,
                _time(row.seconds),
                f"{row.gb_per_s:.2f}",
                f"{row.read_share:.0%}",
                "" if row.error is None else f"{row.error:.1e}",
                row.baseline,
                _time(row.baseline_seconds),
                f"{row.baseline_gb_per_s:.2f}",
                f"{row.ratio:.2f}",
            )
            for row in rows
        ],
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
