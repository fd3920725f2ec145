"""Who decides the codec, in which order, and what is said about it."""

from pathlib import Path
from typing import Any

import pytest

from kvmesh.backends.errors import CheckpointError
from kvmesh.backends.models.codec_check import (
    BLOCK_FORMAT,
    CODEC_FILE,
    CodecCheck,
    Loss,
    read_check,
    write_check,
)
from kvmesh.services.common.codec_choice import check_path, choose_codec, find_check
from kvmesh.services.common.config import ModelConfig, parse_config
from kvmesh.services.common.errors import ConfigError

FINGERPRINT = bytes(range(16))


def loss(kl: float) -> Loss:
    return Loss(kl_nats=kl, kl_p99_nats=kl, top1=0.99, bytes_per_token=100)


def check(**changes: Any) -> CodecCheck:
    fields: dict[str, Any] = {
        "model": "m",
        "fingerprint": FINGERPRINT.hex(),
        "block_format": BLOCK_FORMAT,
        "prompts": "bundled",
        "positions": 10,
        "budget_nats": 0.01,
        "codec": "k3v3",
        "layer_codecs": ("k3v3", "k8v8"),
        "chosen": loss(0.009),
        "uniform": {"k4v4": loss(0.001), "k2v2": loss(0.3)},
        "layers": {"k3v3": (0.002, 0.02)},
        **changes,
    }
    return CodecCheck(**fields)


def checkpoint(folder: Path) -> ModelConfig:
    (folder / "config.json").write_text("{}")
    return ModelConfig(name="m", path=folder)


def test_layer_codecs_come_first() -> None:
    choice = choose_codec(ModelConfig(layer_codecs=("k4v4", "k8v8")), check())
    assert (choice.layer_codecs, choice.rests_on) == (("k4v4", "k8v8"), None)
    assert choice.label == "1 x k4v4, 1 x k8v8"


def test_a_named_codec_comes_before_the_check() -> None:
    choice = choose_codec(ModelConfig(codec="k4v4"), check())
    assert (choice.codec, choice.layer_codecs, choice.warning) == ("k4v4", (), "")
    assert choice.rests_on is None


def test_the_check_decides_if_nothing_is_named() -> None:
    made = check()
    choice = choose_codec(ModelConfig(), made)
    assert (choice.codec, choice.layer_codecs) == ("k3v3", ("k3v3", "k8v8"))
    assert choice.rests_on is made and not choice.warning


def test_a_model_that_was_never_checked_gets_the_default_and_a_warning() -> None:
    choice = choose_codec(ModelConfig(path=Path("/models/m")), None)
    assert (choice.codec, choice.layer_codecs) == ("k4v4", ())
    assert "kvmesh model check /models/m" in choice.warning


@pytest.mark.parametrize(
    ("model", "made", "said"),
    [
        ({"codec": "k4v4"}, None, "nobody has measured what k4v4 costs"),
        ({}, check(block_format="0.0"), f"format 0.0, blocks now have {BLOCK_FORMAT}"),
        ({"codec": "k2v2"}, check(), "KL of 0.3 nats, over the budget of 0.01"),
        ({"codec": "k8v8"}, check(), ""),
        ({"codec": "fp16"}, None, ""),
        ({"layer_codecs": ["k4v4"]}, None, "its layer_codecs"),
        ({"layer_codecs": ["fp16"]}, None, ""),
    ],
)
def test_warnings(model: dict[str, Any], made: CodecCheck | None, said: str) -> None:
    warning = choose_codec(ModelConfig(**model), made).warning
    assert said in warning and bool(said) == bool(warning)


def test_two_choices_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="both set"):
        parse_config({"model": {"codec": "k4v4", "layer_codecs": ["k8v8"]}}, "mesh.toml")
    with pytest.raises(ConfigError, match="layer_codecs"):
        parse_config({"model": {"layer_codecs": ["k9v9"]}}, "mesh.toml")


def test_the_file_beside_the_checkpoint_is_found(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    assert find_check(model) is None
    write_check(tmp_path / CODEC_FILE, check())
    assert find_check(model) == check()
    elsewhere = tmp_path / "other.json"
    with pytest.raises(ConfigError, match=r"other\.json is not there"):
        find_check(model.model_copy(update={"codec_check": elsewhere}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "the whole"),
        (check().model_dump_json().replace("k8v8", "k9v9"), "k9v9"),
        (check().model_dump_json().replace('"format":1', '"format":7'), "format"),
        (check().model_dump_json().replace("budget_nats", "budget"), "budget"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    model = checkpoint(tmp_path)
    check_path(model).write_text(text)
    with pytest.raises(ConfigError, match=CODEC_FILE) as caught:
        find_check(model)
    assert said in str(caught.value) and "kvmesh model check" in str(caught.value)


def test_a_check_of_another_model_is_refused() -> None:
    choice = choose_codec(ModelConfig(), check())
    choice.confirm(FINGERPRINT, Path("f"))
    with pytest.raises(CheckpointError, match=r"fingerprint 000102.* this one has ffff"):
        choice.confirm(b"\xff" * 16, Path("f"))
    choose_codec(ModelConfig(codec="k4v4"), check()).confirm(b"\xff" * 16, Path("f"))


def test_a_check_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / CODEC_FILE
    write_check(path, check())
    assert read_check(path) == check()
    assert [p.name for p in tmp_path.iterdir()] == [CODEC_FILE]
