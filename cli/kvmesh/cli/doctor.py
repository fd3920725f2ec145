"""`kvmesh doctor`: whether this machine can run a mesh, and what to do if it cannot."""

import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvmesh.cli.errors import FAILED
from kvmesh.cli.options import ConfigFile, Json, RunDir, command
from kvmesh.cli.render import console, print_json, print_table, size

if TYPE_CHECKING:
    from kvmesh.services.common.config import MeshConfig

PACKAGES = ("grpcio", "protobuf", "numpy", "tokenizers", "pydantic", "opentelemetry-sdk", "typer")
CPU_PACKAGES = ("numba", "onnx", "onnxruntime")
OPTIONAL_PACKAGES = ("uvloop", "onnxruntime-gpu", "cupy-cuda13x", "cuda-bindings")
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "amx_int8", "asimd")
LOW_MEMORY = 2 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. state: ok, note (something is not there and need not be), or bad."""

    name: str
    state: str
    text: str
    fix: str = ""


@command
def doctor(config: ConfigFile = None, run_dir: RunDir = None, json: Json = False) -> None:
    """Check this machine: packages, CPU, memory, backends, model and ports."""
    findings = list(_findings(config, run_dir))
    bad = [finding for finding in findings if finding.state == "bad"]
    if json:
        print_json({"ok": not bad, "checks": [asdict(finding) for finding in findings]})
    else:
        rows = [(f.state, f.name, f.text + (f"; {f.fix}" if f.fix else "")) for f in findings]
        print_table("", ("", "check", "found"), rows)
        verdict = f"{len(bad)} problems" if bad else "this machine can run a mesh"
        console().print(f"\n{verdict}")
    if bad:
        raise typer.Exit(FAILED)


def _findings(config: Path | None, run_dir: Path | None) -> Iterator[Finding]:
    from kvmesh.services.common.config import load_config

    mesh = load_config(config)
    yield python()
    yield from packages(_installed)
    yield cpu(Path("/proc/cpuinfo"))
    yield memory(Path("/proc/meminfo"))
    yield from _backends()
    yield cuda_kernels()
    yield _model(mesh)
    yield _running_or_ports(mesh, run_dir)


def python() -> Finding:
    text = f"{platform.python_version()} ({platform.python_implementation()}, {sys.platform})"
    return Finding("python", "ok", text)


def packages(installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """installed: the version of a distribution, or None."""
    versions = {n: installed(n) for n in (*PACKAGES, *CPU_PACKAGES, *OPTIONAL_PACKAGES)}
    both = bool(versions["onnxruntime"] and versions["onnxruntime-gpu"])
    for name, version in versions.items():
        if both and name in ("onnxruntime", "onnxruntime-gpu"):
            continue
        if version is not None:
            yield Finding(name, "ok", version)
        elif name in OPTIONAL_PACKAGES:
            yield Finding(name, "note", "not installed, not needed on the CPU")
        elif name == "onnxruntime" and versions["onnxruntime-gpu"]:
            yield Finding(name, "note", "onnxruntime-gpu stands in for it")
        else:
            yield Finding(name, "bad", "not installed", 'pip install "kvmesh[cpu]"')
    if both:
        yield Finding(
            "onnxruntime",
            "bad",
            "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other's files",
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install the one that you want",
        )


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu(cpuinfo: Path) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags: set[str] = set()
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags.update(value.split())
    known = [feature for feature in CPU_FEATURES if feature in flags]
    text = f"{platform.machine()}, {cores} cores, {' '.join(known) or 'features unknown'}"
    if flags and platform.machine() == "x86_64" and "avx2" not in flags:
        return Finding("cpu", "note", text, "without AVX2 attention is several times slower")
    return Finding("cpu", "ok", text)


def memory(meminfo: Path) -> Finding:
    if not meminfo.exists():
        return Finding("memory", "note", "unknown on this system")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    total, free = (int(fields[k].split()[0]) << 10 for k in ("MemTotal", "MemAvailable"))
    text = f"{size(free)} available of {size(total)}"
    if free < LOW_MEMORY:
        fix = "set workers.blocks and kvcache.max_bytes low, or free some"
        return Finding("memory", "note", text, fix)
    return Finding("memory", "ok", text)


def _backends() -> Iterator[Finding]:
    try:
        from kvmesh.backends.registry import list_backends

        reasons = list_backends()
    except ImportError as error:
        yield Finding("backend cpu", "bad", str(error), 'pip install "kvmesh[cpu]"')
        return
    for name, reason in reasons.items():
        if reason is None:
            yield Finding(f"backend {name}", "ok", "available")
        else:  # only the CPU is a must
            yield Finding(f"backend {name}", "bad" if name == "cpu" else "note", reason)


def cuda_kernels() -> Finding:
    """Whether the CUDA kernels run here; no mesh needs them."""
    from kvmesh.kernels.cuda.device import unavailable_reason

    reason = unavailable_reason()
    if reason is not None:
        return Finding("cuda kernels", "note", reason)
    return Finding("cuda kernels", "ok", "a GPU is here; try them: pytest -m gpu kernels/tests")


def _model(mesh: "MeshConfig") -> Finding:
    from kvmesh.services.common.checkpoint import checkpoint_path
    from kvmesh.services.common.errors import ConfigError

    try:
        path = checkpoint_path(mesh.model)
    except ConfigError as error:
        return Finding("model", "bad", str(error))
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if not weights:
        fix = "give a folder that holds a Hugging Face checkpoint"
        return Finding("model", "bad", f"{path} holds no *.safetensors", fix)
    return Finding("model", "ok", f"{mesh.model.name}, {size(weights)} in {path}")


def _running_or_ports(mesh: "MeshConfig", run_dir: Path | None) -> Finding:
    from kvmesh.integration.launch_state import resolve_run_dir, running_state

    path = resolve_run_dir(run_dir)
    state = running_state(path)
    if state is not None:
        return Finding("mesh", "ok", f"runs at {state.public_address}, in {path}")
    taken = [port for port in fixed_ports(mesh) if not port_free(mesh.host, port)]
    if taken:
        text = f"in use on {mesh.host}: {', '.join(map(str, taken))}"
        return Finding("ports", "bad", text, "stop what uses them, or set others in mesh.toml")
    free = ", ".join(map(str, fixed_ports(mesh))) or "any"
    return Finding("ports", "ok", f"free on {mesh.host}: {free}")


def fixed_ports(mesh: "MeshConfig") -> list[int]:
    """The ports that the configuration names; 0 asks for any."""
    ports = [mesh.router.port, mesh.router.mesh_port, mesh.tokenizer.port]
    ports += [worker.port for worker in mesh.workers]
    return [port for port in ports if port]


def port_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
