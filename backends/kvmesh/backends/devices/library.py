"""Reads device files: the package's own, and a user's that extend or override them.

In a file, a number is either a table { value, tag, source } or plain; a plain one has the tag and
source of the table it stands in, or of the nearest table above. `extends = "h100"` starts from
another device. `[take] "efficiency.moe" = "gb300"` copies a table that the device has none of, and
each figure in it then says `taken_from`.
"""

import copy
import difflib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import DeviceError

_INHERITED = ("tag", "source", "taken_from", "fitted_on")
_MOST_EXTENDS = 8


def _bundled() -> Path:
    return Path(str(files("kvmesh.backends"))) / "devices"


def _folders(folder: Path | None) -> list[Path]:
    if folder is not None and not folder.is_dir():
        raise DeviceError(f"{folder} is not a folder; name one that holds device files (*.toml)")
    return [folder, _bundled()] if folder else [_bundled()]


def device_names(folder: Path | None = None) -> list[str]:
    """Names of all devices: those of `folder`, which win over the package's, and the package's."""
    return sorted({path.stem for each in _folders(folder) for path in each.glob("*.toml")})


def load_device(name: str, folder: Path | None = None) -> Device:
    """The device of that name, or the one in a file if `name` is a path to a *.toml.

    Raises DeviceError naming the file, the field, its value and its limit, or the nearest names.
    """
    path = Path(name) if name.endswith(".toml") else _find(name, folder)
    raw = _resolve(path, folder, ())
    try:
        return Device.model_validate(raw)
    except ValidationError as error:
        raise DeviceError(f"{path}: {_explain(error)}") from None


def _find(name: str, folder: Path | None, skip: Path | None = None) -> Path:
    for each in _folders(folder):
        path = each / f"{name}.toml"
        if path.is_file() and path != skip:
            return path
    known = device_names(folder)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise DeviceError(f"no device is named {name!r}; {hint}known: {', '.join(known)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeviceError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(f"{path}: is not TOML: {error}") from error


def _resolve(
    path: Path, folder: Path | None, seen: tuple[tuple[Path, str], ...], field: str = ""
) -> dict[str, Any]:
    """The file with every number a figure, and with what it extends and takes put in.

    field: what is wanted of it, so that two devices may take different tables from each other.
    """
    if (path, field) in seen or len(seen) > _MOST_EXTENDS:
        chain = " -> ".join(each.stem for each, _ in (*seen, (path, field)))
        raise DeviceError(f"{path}: extends or takes from itself: {chain}")
    raw, seen = _read(path), (*seen, (path, field))
    base = _text(path, "extends", raw.pop("extends", None))
    take = raw.pop("take", {})
    # A user's numbers need no ceremony: where they name no source, it is the file itself.
    default = {} if path.parent == _bundled() else {"tag": "U", "source": str(path)}
    own = _to_figures(raw, default)
    own.setdefault("name", path.stem)
    result: dict[str, Any] = {}
    if base is not None:
        result = _resolve(_other(path, "extends", base, folder), folder, seen, field)
    if not isinstance(take, dict):
        raise DeviceError(f"{path}: take is {take!r}, must be a table of field = device")
    for taken, device in take.items():
        if not _overlap(taken, field):
            continue
        origin = _other(path, f"take.{taken}", _text(path, f"take.{taken}", device) or "", folder)
        _put(result, taken, _taken(path, taken, _resolve(origin, folder, seen, taken)))
    return _merge(result, own)


def _other(path: Path, field: str, name: str, folder: Path | None) -> Path:
    """The file of a device that `path` names."""
    try:
        return _find(name, folder, skip=path)
    except DeviceError as error:
        raise DeviceError(f"{path}: {field}: {error}") from None


def _overlap(one: str, other: str) -> bool:
    pairs = zip(one.split("."), other.split("."), strict=False)
    return not other or all(a == b for a, b in pairs)


def _text(path: Path, field: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise DeviceError(f"{path}: {field} is {value!r}, must be the name of a device")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _to_figures(table: dict[str, Any], inherited: dict[str, Any]) -> dict[str, Any]:
    if "value" in table:
        return {**inherited, **table}
    here = {**inherited, **{k: table[k] for k in _INHERITED if k in table}}
    result: dict[str, Any] = {}
    for key, value in table.items():
        if key in _INHERITED:
            continue
        if isinstance(value, dict):
            result[key] = _to_figures(value, here)
        else:
            result[key] = {**here, "value": value} if _is_number(value) else value
    return result


def _taken(path: Path, field: str, origin: dict[str, Any]) -> dict[str, Any]:
    node: Any = origin
    for part in field.split("."):
        if not isinstance(node, dict) or part not in node:
            raise DeviceError(f"{path}: take.{field}: device {origin['name']} has no {field}")
        node = node[part]
    marked: dict[str, Any] = _mark(copy.deepcopy(node), origin["name"])
    return marked


def _mark(node: Any, name: str) -> Any:
    if isinstance(node, dict):
        if "value" in node:
            return {**node, "taken_from": node.get("taken_from") or name}
        return {key: _mark(value, name) for key, value in node.items()}
    return node


def _put(table: dict[str, Any], field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for part in parents:
        table = table.setdefault(part, {})
    table[last] = value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and "value" not in value:
            value = _merge(old, value)
        result[key] = value
    return result


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "the device"
        cause = problem.get("ctx", {}).get("error")
        if cause is not None:
            lines.append(
                f"{where} {cause}" if str(cause).startswith("is ") else f"{where}: {cause}"
            )
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"{where} is not a field of a device file")
        else:
            lines.append(f"{where} is {problem['input']!r}: {problem['msg']}")
    return "; ".join(lines)
