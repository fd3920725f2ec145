"""The run directory and its state file, by which commands find a mesh that runs.

<run dir>/mesh.json   what runs, with its resolved configuration
<run dir>/logs/       one log per member
<run dir>/traces.sqlite   finished spans; see services/traces/store.py
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvmesh.services.common.config import MeshConfig, parse_config
from kvmesh.services.common.errors import ConfigError

STATE_VERSION = 1
RUN_DIR_VARIABLE = "KVMESH_RUN_DIR"


@dataclass(frozen=True, slots=True)
class MemberState:
    """One process as the launcher last saw it; phase is a launch_plan.Phase.

    metrics: host:port of its Prometheus endpoint; empty if it has none.
    """

    member_id: str
    kind: str
    role: str
    phase: str
    pid: int | None
    addresses: tuple[str, ...]
    restarts: int
    metrics: str = ""


@dataclass(frozen=True, slots=True)
class MeshState:
    """A mesh that was started in a run directory.

    launcher_started: the launcher's start time in clock ticks since boot, which tells it from a
        later process of the same pid; None where the system does not say.
    started_at: Unix seconds.
    """

    launcher_pid: int
    launcher_started: int | None
    started_at: float
    ready: bool
    public_address: str
    mesh_address: str
    config: MeshConfig
    members: tuple[MemberState, ...]
    http_url: str = ""  # of the HTTP edge; empty without one
    oip_address: str = ""  # host:port of the Open Inference Protocol; empty without it

    def alive(self) -> bool:
        """Whether the launcher that wrote this still runs."""
        return process_runs(self.launcher_pid, self.launcher_started)


def resolve_run_dir(given: Path | None) -> Path:
    """The directory asked for, or KVMESH_RUN_DIR, or the user's own default; absolute."""
    if given is None and os.environ.get(RUN_DIR_VARIABLE):
        given = Path(os.environ[RUN_DIR_VARIABLE])
    if given is None:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        given = Path(base) / "kvmesh" / "default"
    return given.expanduser().absolute()


def state_path(run_dir: Path) -> Path:
    return run_dir / "mesh.json"


def log_path(run_dir: Path, member_id: str) -> Path:
    return run_dir / "logs" / f"{member_id}.log"


def traces_path(run_dir: Path) -> Path:
    return run_dir / "traces.sqlite"


def last_line(path: Path) -> str:
    """The last line of a log that says something; "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def absolute_paths(config: MeshConfig) -> MeshConfig:
    """The same mesh, readable from any working directory."""

    def absolute(path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path is not None else None

    files = config.security
    named = ("cert", "key", "ca", "token_file", "keys_file")
    security = {key: absolute(getattr(files, key)) for key in named}
    model = {key: absolute(getattr(config.model, key)) for key in ("path", "codec_check")}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "security": files.model_copy(update=security),
        }
    )


def write_state(run_dir: Path, state: MeshState) -> None:
    """Replaces the state file whole, so that a reader never sees half of one."""
    record = {"version": STATE_VERSION, **_record(state)}
    path = state_path(run_dir)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.touch(mode=0o600)
    part.write_text(json.dumps(record, indent=1))
    part.replace(path)


def _record(state: MeshState) -> dict[str, Any]:
    return {
        "launcher_pid": state.launcher_pid,
        "launcher_started": state.launcher_started,
        "started_at": state.started_at,
        "ready": state.ready,
        "public_address": state.public_address,
        "mesh_address": state.mesh_address,
        "http_url": state.http_url,
        "oip_address": state.oip_address,
        "members": [asdict(member) for member in state.members],
        "config": state.config.model_dump(mode="json"),
    }


def read_state(run_dir: Path) -> MeshState | None:
    """What was last written, whether or not it still runs; None if nothing was.

    Raises ConfigError for a file that is not ours or of another version.
    """
    path = state_path(run_dir)
    try:
        data = json.loads(path.read_text())
        if data["version"] != STATE_VERSION:
            raise ConfigError(f"{path} has version {data['version']}, expected {STATE_VERSION}")
        members = tuple(
            MemberState(**{**m, "addresses": tuple(m["addresses"])}) for m in data["members"]
        )
        known = {k: v for k, v in data.items() if k not in ("version", "members", "config")}
        config = parse_config(data["config"], str(path))
        return MeshState(**known, members=members, config=config)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a state file of kvmesh ({error}); remove it if no mesh runs"
        ) from error


def running_state(run_dir: Path) -> MeshState | None:
    """The mesh that runs in `run_dir`; None if there is none, or only what a dead one left."""
    state = read_state(run_dir)
    return state if state is not None and state.alive() else None


def remove_state(run_dir: Path) -> None:
    state_path(run_dir).unlink(missing_ok=True)


def process_started(pid: int) -> int | None:
    """Clock ticks from boot to the start of `pid`; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # The command's name, in parentheses, may hold blanks; the start is field 22 of the line.
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def process_runs(pid: int, started: int | None = None) -> bool:
    """Whether `pid` runs and, if `started` is known, is still the same process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        # A zombie has ended; only its parent has not asked yet.
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
    except (OSError, IndexError):
        pass
    return started is None or process_started(pid) in (None, started)


@contextmanager
def run_dir_lock(run_dir: Path) -> Iterator[None]:
    """Holds the directory for one launcher. Raises ConfigError if another one has it."""
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        file = (run_dir / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot use the run directory {run_dir}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"a mesh already runs in {run_dir}; stop it with 'kvmesh down', "
                "or give another --run-dir"
            ) from error
        yield
