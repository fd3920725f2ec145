"""`kvmesh devices` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvmesh.cli.main import app


def kvmesh(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_list_has_every_device():
    told = json.loads(kvmesh("devices", "list", "--json").stdout)
    names = {device["name"] for device in told}
    assert names >= {"h100", "rubin", "lpu-v1", "lp30"}
    assert "rubin" in kvmesh("devices", "list").stdout


def test_the_list_is_what_the_group_shows(tmp_path: Path):
    assert kvmesh("devices").stdout == kvmesh("devices", "list").stdout
    (tmp_path / "mine.toml").write_text('extends = "h100"\n')
    told = json.loads(kvmesh("devices", "--folder", str(tmp_path), "--json").stdout)
    assert "mine" in {device["name"] for device in told}


def test_show_gives_value_tag_and_source():
    result = kvmesh("devices", "show", "rubin")
    assert result.exit_code == 0
    assert "taken from gb300" in result.stdout and "fitted on C15" in result.stdout
    told = json.loads(kvmesh("devices", "show", "h100", "--json").stdout)
    assert told["memory"]["bandwidth_bytes_s"]["value"] == 3.35e12
    assert told["memory"]["bandwidth_bytes_s"]["tag"] == "D"


def test_a_users_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "h100.toml").write_text('extends = "h100"\n[power]\ntgp_w = 350\n')
    told = json.loads(kvmesh("devices", "show", "h100", "--folder", str(tmp_path), "--json").stdout)
    assert told["power"]["tgp_w"]["value"] == 350
    monkeypatch.setenv("KVMESH_DEVICES", str(tmp_path))
    assert json.loads(kvmesh("devices", "show", "h100", "--json").stdout) == told


def test_what_is_wrong_is_named(tmp_path: Path):
    (tmp_path / "bad.toml").write_text('extends = "h100"\n[memory]\nbandwidth_bytes_s = -3.35e12\n')
    result = kvmesh("devices", "show", str(tmp_path / "bad.toml"))
    assert result.exit_code == 2
    assert "memory.bandwidth_bytes_s is -3.35e+12, must be greater than 0" in result.stderr
    (tmp_path / "bad.toml").write_text('extends = "h1000"\n')
    result = kvmesh("devices", "list", "--folder", str(tmp_path))
    assert result.exit_code == 2 and "bad.toml: extends: no device" in result.stderr
    result = kvmesh("devices", "show", "rubn")
    assert result.exit_code == 2 and "did you mean 'rubin'" in result.stderr


@pytest.mark.parametrize("option", [("--folder", "."), ("--json",)])
def test_an_option_before_the_subcommand_is_refused_not_lost(option: tuple[str, ...]):
    result = kvmesh("devices", *option, "show", "h100")
    assert result.exit_code == 2
    assert f"{option[0]} belongs behind 'show'" in result.stderr
