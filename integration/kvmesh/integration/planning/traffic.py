"""Workload files: what requests look like, in which scenario they come and what limits they have.

A workload is a small TOML file; the package's own are in `workloads/`, and a path to another works
wherever a name does. `name:scenario` chooses a scenario of it.
"""

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvmesh.integration.planning.lengths import Lengths
from kvmesh.services.common.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class WorkloadError(ConfigError):
    """A workload file that is unknown or malformed; the message names file, field and limit."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Session(Section):
    """Requests that follow each other. Each prompt holds all that was said before.

    turns: requests of a session. pause_s: mean seconds between two of them, drawn from an
    exponential distribution unless fixed_pause. shared_tokens: what all sessions of one of `groups`
    begin with. first_only: only the first turn has the input, later ones `next_tokens`.
    """

    turns: Lengths = Lengths.of(1)
    pause_s: Positive = 30.0
    fixed_pause: bool = False
    shared_tokens: Annotated[int, Field(ge=0)] = 0
    groups: Count = 1
    first_only: bool = False
    next_tokens: Count | None = None

    @model_validator(mode="after")
    def _complete(self) -> "Session":
        if self.first_only and self.next_tokens is None:
            raise ValueError("next_tokens is missing, which first_only needs")
        return self


class Frames(Section):
    """A video's: [input] counts frames of so many tokens; a question follows them."""

    tokens: Count
    question_tokens: Annotated[int, Field(ge=0)] = 0


class Scenario(Section):
    """How requests come. poisson: at independent times; closed: one when one has ended; offline:
    all at once. ttft_ms, tpot_ms: limits that 99 % of requests must keep."""

    arrival: Literal["poisson", "closed", "offline"]
    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None


class Workload(Section):
    """One kind of traffic. model: whose it is, for a plan that names none."""

    name: str
    title: str
    source: str
    default: str
    model: str | None = None
    share_prefixes: bool = True
    input: Lengths
    output: Lengths
    session: Session = Session()
    frames: Frames | None = None
    scenarios: Annotated[dict[str, Scenario], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "Workload":
        if self.default not in self.scenarios:
            known = ", ".join(self.scenarios)
            raise ValueError(f"default is {self.default!r}, must be one of scenarios: {known}")
        return self

    @property
    def scenario(self) -> Scenario:
        return self.scenarios[self.default]


def _folder() -> Path:
    return Path(str(files("kvmesh.integration.planning"))) / "workloads"


def workload_names() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load_workload(name: str) -> Workload:
    """The workload of that name, or the one in a file if it ends in .toml; `:scenario` may follow.

    Raises WorkloadError naming the file, the field, its value and its limit, or the nearest names.
    """
    base, _, scenario = name.partition(":") if not Path(name).is_file() else (name, "", "")
    workload = _read(Path(base) if base.endswith(".toml") else _find(base))
    if not scenario:
        return workload
    if scenario not in workload.scenarios:
        known = ", ".join(workload.scenarios)
        raise WorkloadError(f"workload {base} has no scenario {scenario!r}; it has: {known}")
    return workload.model_copy(update={"default": scenario})


def workload_text(name: str) -> str:
    """The file of a workload that load_workload() knows by this name."""
    base = name.partition(":")[0]
    path = Path(name) if Path(name).is_file() else Path(base)
    return (path if path.suffix == ".toml" else _find(base)).read_text(encoding="utf-8")


def _find(name: str) -> Path:
    path = _folder() / f"{name}.toml"
    if path.is_file():
        return path
    known = workload_names()
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise WorkloadError(f"no workload is named {name!r}; {hint}known: {', '.join(known)}")


def _read(path: Path) -> Workload:
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: is not TOML: {error}") from error
    try:
        return Workload.model_validate({"name": path.stem, **raw})
    except ValidationError as error:
        told = "; ".join(explain(problem) for problem in error.errors())
        raise WorkloadError(f"{path}: {told}") from None


def explain(problem: "ErrorDetails") -> str:
    """One wrong field, its value and its limit."""
    where = ".".join(str(part) for part in problem["loc"])
    cause = problem.get("ctx", {}).get("error")
    if cause is not None:
        return f"{where}: {cause}" if where else str(cause)
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{where} is not a field here"
    return f"{where} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
