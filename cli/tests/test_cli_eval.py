"""`kvmesh eval` and `kvmesh model check`, as people and programs call them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmesh.backends.models.codec_check import BLOCK_FORMAT, CODEC_FILE, read_check
from kvmesh.backends.models.loader import load_checkpoint
from kvmesh.cli.main import app
from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.config import ModelConfig

MINI = checkpoint_path(ModelConfig())


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_kl_compares_codecs_and_draws(tmp_path: Path) -> None:
    plots = tmp_path / "plots"
    small = ["eval", "kl", "--codecs", "fp16,k2v2", "--tokens", "130", "--length", "130"]
    told = json.loads(invoke(*small, "--json", "--plots", str(plots)))
    exact, lossy = told["rows"]
    assert (exact["codec"], exact["kl_nats"], exact["top1"]) == ("fp16", 0, 1)
    assert lossy["kl_nats"] > 0 and lossy["bytes_per_token"] < exact["bytes_per_token"]
    names = [f"kl-{kind}.{suffix}" for kind in ("bytes", "position") for suffix in ("png", "svg")]
    assert sorted(path.name for path in plots.iterdir()) == names
    assert "| k2v2 | 576 |" in invoke(*small, "--markdown")


async def test_needle_tells_every_cell(tmp_path: Path) -> None:
    """A coroutine, as a command that runs a mesh has an event loop of its own."""
    import asyncio

    arguments = ["eval", "needle", "--codecs", "fp16,auto", "--lengths", "256", "--depths", "0,1"]
    arguments += ["--cases", "2", "--json", "--plots", str(tmp_path)]
    told = json.loads(await asyncio.to_thread(invoke, *arguments))
    assert [score["group"] for score in told["scores"][2:]] == [["256", "0%"], ["256", "100%"]]
    assert [score["codec"] for score in told["scores"]] == ["fp16"] * 2 + ["auto"] * 2
    found = told["differences"]["auto"]
    assert found["cases"] == 2 and found["low"] <= found["mean"] <= found["high"]
    assert all(score["cases"] == 1 and not score["errors"] for score in told["scores"])
    assert (tmp_path / "needle-auto.svg").read_text().startswith("<svg")
    assert (tmp_path / "needle-auto.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_is_checked_and_the_result_written(tmp_path: Path) -> None:
    target = tmp_path / "check.json"
    small = ["--tokens", "130", "--length", "130", "--codecs", "k2v2"]
    told = invoke("model", "check", "mini", *small, "-o", str(target))
    found = read_check(target)
    assert found is not None and len(found.layer_codecs) == 4
    assert found.chosen.kl_nats <= found.budget_nats
    assert f"budget of 0.02 nats; written to {target}" in told.replace("\n", "")


def test_the_bundled_model_has_been_checked() -> None:
    """As it is: 'kvmesh model check' writes the file anew after a change of model or format."""
    found = read_check(MINI / CODEC_FILE)
    assert found is not None
    assert found.fingerprint == load_checkpoint(MINI).fingerprint.hex()
    assert found.block_format == BLOCK_FORMAT
    assert found.chosen.kl_nats <= found.budget_nats


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "needle", "--lengths", "17"], "target_tokens must be"),
        (["eval", "needle", "--lengths", "a"], "must be numbers"),
        (["eval", "needle", "--codecs", "k9v9"], "k9v9"),
        (["eval", "ruler", "--tasks", "x"], "no task is named 'x'"),
        (["eval", "longbench", "/nowhere"], "is not a folder"),
        (["model", "check", "--codecs", "k9v9"], "k9v9"),
        (["model", "check", "--budget", "0"], "must be above 0"),
        (["model", "check", "absent"], "is not bundled"),
        (["model", "check", "--prompts", "/nowhere"], "cannot read"),
    ],
)
def test_a_mistake_is_named_with_exit_code_2(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert said in result.stderr
