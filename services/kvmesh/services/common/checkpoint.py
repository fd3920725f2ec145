"""Where the model's files are: the folder that mesh.toml names, or the bundled one."""

from importlib.resources import files
from pathlib import Path

from kvmesh.services.common.config import ModelConfig
from kvmesh.services.common.errors import ConfigError

CONFIG_FILE = "config.json"  # what makes a folder a Hugging Face checkpoint


def checkpoint_path(model: ModelConfig) -> Path:
    """The checkpoint folder of `model`: its path, or the bundled model of its name.

    Raises ConfigError naming what is missing.
    """
    if model.path is None:
        return _bundled(model.name)
    if not model.path.is_dir():
        raise ConfigError(f"model.path {model.path} is not a folder; name a checkpoint's folder")
    if not (model.path / CONFIG_FILE).is_file():
        raise ConfigError(f"model.path {model.path} holds no {CONFIG_FILE}; not a checkpoint")
    return model.path


def _bundled(name: str) -> Path:
    root = Path(str(files("kvmesh.backends"))) / "bundled"
    known = sorted(path.parent.name for path in root.glob(f"*/{CONFIG_FILE}"))
    if name not in known:
        raise ConfigError(
            f"model.name {name!r} is not bundled (there are: {', '.join(known) or 'none'}); "
            "set model.path to a checkpoint's folder"
        )
    return root / name
