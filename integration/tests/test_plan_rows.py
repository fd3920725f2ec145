"""Published runs that somebody brings: predicted like the calibration set, or refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmesh.cli.main import app
from kvmesh.integration.calibration.rows import RowsError, bundled_rows, read_rows
from kvmesh.integration.calibration.servings import servings

MINE = """
[default]
weights = "fp8"
[[offline]]
id = "mine"
case = "Llama 3.1 8B, 1 x H100"
workload = "mlperf-llama-3.1-8b:offline"
device = "h100"
sequences = 512
step_tokens = 8192
samples = 13368
published = 9000
tolerance = 0.9
source = "a test"
[[closed]]
id = "mine"
case = "8 in flight"
model = "llama-3.1-8b"
device = "h100"
input = 256
output = 32
concurrency = 8
ttft_ms = 20
tpot_ms = 5
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    return path


def test_a_file_of_ones_own_is_predicted(path: Path):
    result = CliRunner().invoke(app, ["plan", "validate", "--rows", str(path), "--json"])
    told = json.loads(result.stdout)
    assert {row["unit"] for row in told["rows"]} == {
        "tok/s/GPU", "ms TTFT, mean", "ms TPOT, mean",
    }  # fmt: skip
    assert all(row["predicted"] > 0 and row["held_out"] for row in told["rows"])
    table = CliRunner().invoke(app, ["plan", "validate", "--rows", str(path)])
    assert "mine" in table.stdout and "simulated" in table.stdout


def test_a_smaller_batch_predicts_less(path: Path):
    whole = next(iter(servings(read_rows(path)))).predicted
    path.write_text(MINE.replace("sequences = 512", "sequences = 16"))
    assert next(iter(servings(read_rows(path)))).predicted < 0.6 * whole


def test_bundled_rows_say_what_they_are_of():
    rows = bundled_rows()
    every = (*rows.offline, *rows.server, *rows.closed)
    assert all(row.source and row.tag == "M" for row in every)
    assert {row.fitted for row in every if row.fitted} == {
        "routing: placed rather than by a power law", "host gap per sequence", "Rubin's scale",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "published = 9000",
            "published = -1",
            r"offline.0.published is -1: input should be greater",
        ),
        ("samples = 13368\n", "", r"offline.0.samples is missing"),
        ("concurrency = 8", "users = 8", r"closed.0.users is not a field here"),
        ('device = "h100"', "device = 3", r"offline.0.device is 3"),
        ("[default]", "[default", r"is not TOML"),
        ("[default]\n", "default = 3\n[other]\n", r"default is 3, must be a table"),
    ],
)
def test_a_wrong_file_names_row_and_field(path: Path, old: str, new: str, message: str):
    path.write_text(MINE.replace(old, new, 1))
    with pytest.raises(RowsError, match=message):
        read_rows(path)


def test_a_file_that_is_not_there_and_a_row_without_a_model(path: Path):
    with pytest.raises(RowsError, match=r"cannot be read"):
        read_rows(path.with_name("none.toml"))
    path.write_text(MINE.replace("mlperf-llama-3.1-8b:offline", "chat:offline"))
    with pytest.raises(RowsError, match=r"row mine: model is missing"):
        list(servings(read_rows(path)))
    result = CliRunner().invoke(app, ["plan", "validate", "--rows", "none.toml"])
    assert result.exit_code == 2 and "cannot be read" in result.output
