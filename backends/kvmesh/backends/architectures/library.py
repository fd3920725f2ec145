"""Finds a model's shape: bundled by name, a TOML file, or a Hugging Face folder or config.json."""

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvmesh.backends.architectures.huggingface import read_shape
from kvmesh.backends.architectures.shape import ModelShape, validated
from kvmesh.backends.errors import ShapeError


def _root() -> Path:
    return Path(str(files("kvmesh.backends")))


def _checkpoints() -> dict[str, Path]:
    return {path.parent.name: path for path in (_root() / "bundled").glob("*/config.json")}


def shape_names() -> list[str]:
    """Names that load_shape knows without a path."""
    published = (path.stem for path in (_root() / "architectures").glob("*.toml"))
    return sorted({*published, *_checkpoints()})


def load_shape(name: str) -> ModelShape:
    """The shape of that name; or that of a *.toml, a config.json, or a folder with a config.json.

    Raises ShapeError naming the file, the field, its value and limit, or the nearest name, and
    CheckpointError for a config.json that cannot be read.
    """
    path = _root() / "architectures" / f"{name}.toml"
    if path.is_file():
        return _read(path)
    if name in _checkpoints():
        return read_shape(_checkpoints()[name])
    given = Path(name)
    if given.suffix == ".toml":
        return _read(given)
    if given.is_dir():
        return read_shape(given / "config.json")
    if given.suffix == ".json":
        return read_shape(given)
    known = shape_names()
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ShapeError(
        f"no model is named {name!r}; {hint}known: {', '.join(known)}, or a path to a config.json"
    )


def _read(path: Path) -> ModelShape:
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ShapeError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ShapeError(f"{path}: is not TOML: {error}") from error
    return validated(path, {"name": path.stem, **raw})
