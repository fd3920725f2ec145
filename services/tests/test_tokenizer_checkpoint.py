"""Finding a model's folder."""

from pathlib import Path

import pytest

from kvmesh.services.common.checkpoint import checkpoint_path
from kvmesh.services.common.config import ModelConfig
from kvmesh.services.common.errors import ConfigError


def test_bundled_model_is_found_by_its_name() -> None:
    folder = checkpoint_path(ModelConfig())
    assert (folder.name, folder.parent.name) == ("mini", "bundled")
    assert (folder / "tokenizer.json").is_file()


def test_path_wins_over_the_bundled_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_path(ModelConfig(path=tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["absent", "..", "", "../bundled/mini"])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not bundled \(there are: mini\); set model.path"):
        checkpoint_path(ModelConfig(name=name))


def test_path_without_a_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent is not a folder"):
        checkpoint_path(ModelConfig(path=tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        checkpoint_path(ModelConfig(path=tmp_path))
