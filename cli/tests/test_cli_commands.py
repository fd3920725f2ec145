"""The command as a user meets it: parsing, exit codes, one clear line for every error."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvmesh.cli.main import app

COMMANDS = ["up", "down", "status", "generate", "chat", "route", "models", "doctor", "demo"]


@pytest.fixture(autouse=True)
def no_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find an empty run directory, whatever runs on this machine."""
    for name in ("KVMESH_ADDRESS", "KVMESH_TOKEN", "KVMESH_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KVMESH_RUN_DIR", str(tmp_path / "run"))


def kvmesh(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def plain(text: str) -> str:
    """Without colours and the line breaks of a narrow terminal."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def test_cli_help_lists_every_command_but_serve():
    result = kvmesh("--help")
    assert result.exit_code == 0
    names = re.findall(r"^│ (\w+) ", result.stdout, re.MULTILINE)
    assert set(names) >= {*COMMANDS, "kv", "trace"}
    assert "serve" not in names


@pytest.mark.parametrize("command", [*COMMANDS, "kv stats", "trace list", "trace show", "serve"])
def test_cli_every_command_explains_itself(command: str):
    result = kvmesh(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("models",),
        ("kv", "stats"),
        ("generate", "hello"),
        ("route", "hello"),
        ("chat",),
        ("down",),
        ("status", "--json"),
    ],
    ids=" ".join,
)
def test_cli_without_a_mesh_says_how_to_start_one(arguments: tuple[str, ...], tmp_path: Path):
    result = kvmesh(*arguments)
    assert result.exit_code == 3
    message = f"error: no mesh runs in {tmp_path / 'run'}; start one with 'kvmesh up'"
    assert plain(result.stderr) == message
    assert result.stdout == ""


def test_cli_stale_state_counts_as_no_mesh(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    state = {
        "version": 1,
        "launcher_pid": process.pid,
        "launcher_started": None,
        "started_at": 0.0,
        "ready": True,
        "public_address": "127.0.0.1:1",
        "mesh_address": "",
        "members": [],
        "config": {},
    }
    (run_dir / "mesh.json").write_text(json.dumps(state))
    assert kvmesh("status").exit_code == 3
    assert kvmesh("down").exit_code == 3
    assert not (run_dir / "mesh.json").exists()


def test_cli_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvmesh.cli.connect.CONNECT_S", 0.2)
    result = kvmesh("status", "--address", "127.0.0.1:1")
    assert result.exit_code == 3
    assert "no mesh answers at 127.0.0.1:1 (without TLS)" in plain(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "hi", "--max-tokens", "0"), "--max-tokens"),
        (("generate", "hi", "--temperature", "-1"), "--temperature"),
        (("generate", "hi", "--no-such-option"), "--no-such-option"),
        (("generate", "hi", "--raw", "--system", "x"), "--system needs --chat"),
        (("generate", " "), "the prompt is empty"),
        (("generate", "hi", "--file", "there.txt"), "not both"),
        (("generate", "--file", "nowhere.txt"), "cannot read nowhere.txt"),
        (("frobnicate",), "frobnicate"),
        (("up", "--config", "nowhere.toml"), "cannot read nowhere.toml"),
        (("serve", "worker-0"), "worker-0 needs --mesh-address"),
        (("serve", "worker-0", "--mesh-address", "a:1", "--run-dir", "nowhere"), "--config"),
        (("serve", "cook-0", "--mesh-address", "a:1"), "'cook-0' has no known kind"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_cli_usage_errors_exit_2(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    result = kvmesh(*arguments)
    assert result.exit_code == 2
    assert words in plain(result.stderr)
    assert "Traceback" not in result.output


def test_cli_config_errors_name_file_and_key(tmp_path: Path):
    config = tmp_path / "mesh.toml"
    config.write_text("[router]\nprot = 1\n")
    result = kvmesh("up", "--config", str(config))
    assert result.exit_code == 2
    expected = f"error: {config}: unknown key 'router.prot', did you mean 'port'?"
    assert plain(result.stderr) == expected


def test_cli_public_address_without_credentials_is_refused(tmp_path: Path):
    config = tmp_path / "mesh.toml"
    config.write_text('host = "0.0.0.0"\n')
    result = kvmesh("up", "--config", str(config))
    assert result.exit_code == 2
    assert "0.0.0.0 can be reached from other machines" in plain(result.stderr)


def test_cli_prompt_from_stdin_reaches_the_mesh_check():
    assert kvmesh("generate", stdin="a prompt").exit_code == 3
    assert kvmesh("generate", "-", stdin="").exit_code == 2


def test_cli_starts_without_the_heavy_libraries():
    """What makes `kvmesh --help` fast: grpc, pydantic, numpy and asyncio servers come later."""
    code = (
        "import sys; import kvmesh.cli.main\n"
        "heavy = {'grpc', 'pydantic', 'numpy', 'opentelemetry', 'tokenizers', 'google.protobuf'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cli_completes_command_names():
    environment = {
        "_KVMESH_COMPLETE": "complete_bash",
        "COMP_WORDS": "kvmesh st",
        "COMP_CWORD": "1",
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="kvmesh")
    assert result.stdout.split() == ["status"]
