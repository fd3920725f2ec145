"""The state file: whole, recognised when stale, one launcher per directory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvmesh.integration.launch_state import (
    MemberState,
    MeshState,
    absolute_paths,
    last_line,
    process_runs,
    process_started,
    read_state,
    resolve_run_dir,
    run_dir_lock,
    running_state,
    write_state,
)
from kvmesh.services.common.config import MeshConfig, ModelConfig, SecurityConfig, WorkerConfig
from kvmesh.services.common.errors import ConfigError


def make_state(**changes: object) -> MeshState:
    state = MeshState(
        launcher_pid=os.getpid(),
        launcher_started=process_started(os.getpid()),
        started_at=1.5,
        ready=True,
        public_address="127.0.0.1:1",
        mesh_address="127.0.0.1:2",
        config=MeshConfig(
            model=ModelConfig(path=Path("/models/m")), workers=(WorkerConfig(blocks=7),)
        ),
        members=(MemberState("router", "router", "", "ready", 5, ("127.0.0.1:1",), 0),),
    )
    return replace(state, **changes)


def test_launch_state_survives_a_round_trip(tmp_path: Path):
    state = make_state()
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert running_state(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == ["mesh.json"]


def test_launch_state_of_a_dead_launcher_is_stale(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    write_state(tmp_path, make_state(launcher_pid=process.pid, launcher_started=None))
    assert read_state(tmp_path) is not None
    assert running_state(tmp_path) is None


@pytest.mark.skipif(process_started(os.getpid()) is None, reason="no start times on this system")
def test_launch_state_of_a_reused_pid_is_stale(tmp_path: Path):
    write_state(tmp_path, make_state(launcher_started=1))
    assert running_state(tmp_path) is None


def test_launch_state_a_process_that_ended_unreaped_does_not_run():
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()  # its end of the pipe closes as it ends
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not process_runs(process.pid)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', '{"version": 1}'])
def test_launch_state_refuses_what_is_not_one(tmp_path: Path, text: str):
    (tmp_path / "mesh.json").write_text(text)
    with pytest.raises(ConfigError, match=r"mesh\.json"):
        read_state(tmp_path)


def test_launch_state_is_absent_without_a_file(tmp_path: Path):
    assert read_state(tmp_path) is None


def test_launch_state_keeps_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVMESH_TOKEN", "s3cret")
    write_state(tmp_path, make_state())
    text = (tmp_path / "mesh.json").read_text()
    assert "s3cret" not in text
    assert json.loads(text)["version"] == 1


def test_launch_state_one_launcher_per_directory(tmp_path: Path):
    with (
        run_dir_lock(tmp_path),
        pytest.raises(ConfigError, match="already runs"),
        run_dir_lock(tmp_path),
    ):
        pass
    with run_dir_lock(tmp_path):  # free again
        pass


def test_launch_state_run_dir_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KVMESH_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert resolve_run_dir(None) == tmp_path / "state" / "kvmesh" / "default"
    monkeypatch.setenv("KVMESH_RUN_DIR", str(tmp_path / "env"))
    assert resolve_run_dir(None) == tmp_path / "env"
    assert resolve_run_dir(tmp_path / "given") == tmp_path / "given"


def test_launch_state_makes_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = MeshConfig(
        model=ModelConfig(path=Path("m")), security=SecurityConfig(ca=Path("ca.pem"))
    )
    moved = absolute_paths(config)
    assert moved.model.path == tmp_path / "m"
    assert moved.security.ca == tmp_path / "ca.pem"
    assert moved.security.cert is None


def test_launch_state_last_line_of_a_log(tmp_path: Path):
    log = tmp_path / "a.log"
    assert last_line(log) == ""
    log.write_text("x" * 10_000 + "\nfirst\n the end \n\n")
    assert last_line(log) == "the end"
