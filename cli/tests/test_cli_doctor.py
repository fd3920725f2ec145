"""What doctor says of machines that are not this one."""

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmesh.cli import doctor
from kvmesh.cli.main import app
from kvmesh.services.common.config import MeshConfig, RouterConfig, TokenizerConfig, WorkerConfig

GOOD = dict.fromkeys((*doctor.PACKAGES, *doctor.CPU_PACKAGES), "1.0")


def states(installed: dict[str, str]) -> dict[str, str]:
    return {finding.name: finding.state for finding in doctor.packages(installed.get)}


def test_cli_doctor_accepts_a_cpu_install():
    found = states(GOOD)
    assert {found[name] for name in GOOD} == {"ok"}
    assert {found[name] for name in doctor.OPTIONAL_PACKAGES} == {"note"}


def test_cli_doctor_names_the_broken_mix_and_its_fix():
    found = [f for f in doctor.packages({**GOOD, "onnxruntime-gpu": "1"}.get) if f.state == "bad"]
    (finding,) = found
    assert "both installed" in finding.text
    assert "pip uninstall onnxruntime onnxruntime-gpu" in finding.fix


def test_cli_doctor_takes_the_gpu_build_instead():
    without = {name: version for name, version in GOOD.items() if name != "onnxruntime"}
    assert states({**without, "onnxruntime-gpu": "1"})["onnxruntime"] == "note"
    assert states(without)["onnxruntime"] == "bad"
    assert states({**GOOD, "numba": ""} | {"x": "1"})["numba"] == "ok"


@pytest.mark.parametrize(("free_kib", "state"), [(1 << 20, "note"), (8 << 20, "ok")])
def test_cli_doctor_reads_memory(tmp_path: Path, free_kib: int, state: str):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {free_kib} kB\n")
    finding = doctor.memory(meminfo)
    assert (finding.state, finding.text) == (state, f"{free_kib >> 20} GiB available of 16 GiB")


def test_cli_doctor_reads_cpu_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo.write_text("processor : 0\nflags : fpu sse2 avx2 fma\n")
    assert doctor.cpu(cpuinfo).state == "ok"
    assert doctor.cpu(cpuinfo).text.endswith("avx2 fma")
    cpuinfo.write_text("processor : 0\nflags : fpu sse2\n")
    assert doctor.cpu(cpuinfo).state == "note"


def test_cli_doctor_checks_only_ports_that_are_named():
    mesh = MeshConfig(
        router=RouterConfig(port=5001, mesh_port=0),
        tokenizer=TokenizerConfig(port=5002),
        workers=(WorkerConfig(), WorkerConfig(port=5003)),
    )
    assert doctor.fixed_ports(mesh) == [5001, 5002, 5003]


def test_cli_doctor_finds_a_port_in_use(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = tmp_path / "mesh.toml"
        config.write_text(f"[router]\nport = {port}\n")
        result = run_doctor(config, tmp_path)
        checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
        assert checks["ports"]["state"] == "bad"
        assert str(port) in checks["ports"]["text"]
        assert result.exit_code == 1
    assert doctor.port_free("127.0.0.1", port)


def test_cli_doctor_fails_without_its_model(tmp_path: Path):
    config = tmp_path / "mesh.toml"
    config.write_text(f"[router]\nport = 0\n[model]\npath = '{tmp_path / 'none'}'\n")
    result = run_doctor(config, tmp_path)
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (1, False)
    assert [check["name"] for check in report["checks"] if check["state"] == "bad"] == ["model"]


def run_doctor(config: Path, folder: Path):
    arguments = ["doctor", "--json", "--config", str(config), "--run-dir", str(folder / "run")]
    return CliRunner().invoke(app, arguments)


def test_cli_doctor_tells_why_the_cuda_kernels_do_not_run():
    from kvmesh.kernels.cuda.device import unavailable_reason

    finding = doctor.cuda_kernels()
    assert finding.state == ("ok" if unavailable_reason() is None else "note")
    assert finding.text
