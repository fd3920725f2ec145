"""`kvmesh keys`: a key is shown once, works, and can be taken back."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvmesh.cli.main import app
from kvmesh.services.common.api_keys import KeyTable
from kvmesh.services.common.key_file import read_document


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMESH_KEYS_FILE", raising=False)


def keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def test_a_key_is_made_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    made = keys("new", "acme", "--file", file, "--requests-per-minute", "60")
    key = made.stdout.strip()
    assert made.exit_code == 0 and len(key.split()) == 1  # alone on stdout, for a pipe
    found = KeyTable(read_document(Path(file))).find(key)
    assert found is not None and found.limits.requests_per_minute == 60
    second = json.loads(keys("new", "beta", "--file", file, "--json").stdout)
    assert KeyTable(read_document(Path(file))).find(second["key"]) is not None

    listed = keys("list", "--file", file)
    assert "acme" in listed.stdout and key.split("_")[2] not in listed.stdout
    assert key not in (tmp_path / "keys.json").read_text()
    assert keys("revoke", second["id"], "--file", file).exit_code == 0
    rows = json.loads(keys("list", "--file", file, "--json").stdout)
    assert [(row["tenant"], row["state"]) for row in rows] == [
        ("acme", "active"), ("beta", "revoked"),
    ]  # fmt: skip
    assert KeyTable(read_document(Path(file))).find(second["key"]) is None


def test_the_file_of_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text(f'[security]\nkeys_file = "{tmp_path / "k"}"\n')
    assert keys("new", "acme", "--config", str(config)).exit_code == 0
    assert (tmp_path / "k").exists()


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    assert keys("list").exit_code == 2
    missing = keys("revoke", "1234", "--file", file)
    assert missing.exit_code == 2 and "keys new" in missing.output
    assert not (tmp_path / "keys.json").exists()
    assert keys("new", "a b", "--file", file).exit_code == 2
    assert not (tmp_path / "keys.json").exists()
    (tmp_path / "keys.json").write_text("{}")
    broken = keys("list", "--file", file)
    assert broken.exit_code == 2 and "secret" in broken.output
