"""Published runs as data: servings.toml, and files of the same form that others bring.

A file has tables [[offline]], [[server]] and [[closed]], and a [default] whose fields hold for all
rows that do not say otherwise.
"""

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvmesh.integration.planning.traffic import explain
from kvmesh.services.common.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class RowsError(ConfigError):
    """A file of rows that cannot be used; the message names file, row, field and limit."""


class Row(BaseModel):
    """What all runs have: what was run on which devices, and how far to trust what was published.

    fitted: the constant that was fitted on it; why: what is known about its error. request_s: of a
    request outside of the engine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    case: str
    device: str
    model: str | None = None
    weights: str = "bf16"
    kv: str = "fp8"
    attention: str | None = None
    routing: Literal["balanced", "placed", "power_law"] = "placed"
    overlap: bool = False
    exchange: Literal["bf16", "fp8"] = "bf16"
    tensor: Count = 1
    data: Count = 1
    expert: Count = 1
    pipeline: Count = 1
    request_s: Annotated[float, Field(ge=0)] = 0.0
    tolerance: Positive = 0.10
    tag: Literal["M", "D", "C", "X", "R", "U"] = "U"
    source: str = ""
    fitted: str = ""
    why: str = ""


class Run(Row):
    """Of a workload. instances: of the model, that share the samples. sequences: that a rank may
    run at once, over all stages. step_tokens: most of a rank's step."""

    workload: str
    output_mean: Positive | None = None
    instances: Count = 1
    sequences: Positive
    step_tokens: Count = 8192
    samples: Positive


class Offline(Run):
    """published: output tokens per second and device."""

    published: Positive


class Pool(BaseModel):
    """Of a pool for prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Count = 1
    expert: Count = 1
    instances: Count = 1


class Server(Run):
    """tokens_s: per device, in LoadGen's window. devices: all of them. The percentiles are
    simulated, and are there only with a pool for prompts."""

    requests_s: Positive
    drafts: Annotated[int, Field(ge=0, le=3)] = 0
    devices: Count | None = None
    prefill: Pool | None = None
    tokens_s: Positive
    tpot_ms: Positive
    tpot_p99_ms: Positive | None = None
    ttft_p99_ms: Positive | None = None
    ttft_tolerance: Positive = 0.30


class Closed(Row):
    """`concurrency` requests in flight; input, output: mean tokens. ttft_ms, tpot_ms: means."""

    input: Count
    output: Count
    concurrency: Count
    ttft_ms: Positive
    tpot_ms: Positive
    ttft_tolerance: Positive = 0.20


class Rows(BaseModel):
    """A file's rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    offline: tuple[Offline, ...] = ()
    server: tuple[Server, ...] = ()
    closed: tuple[Closed, ...] = ()


def bundled_rows() -> Rows:
    return read_rows(Path(str(files("kvmesh.integration.calibration"))) / "servings.toml")


def read_rows(path: Path) -> Rows:
    """Raises RowsError for a file that cannot be read or a field that is wrong."""
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RowsError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RowsError(f"{path}: is not TOML: {error}") from error
    default = tables.pop("default", {})
    if not isinstance(default, dict):
        raise RowsError(f"{path}: default is {default!r}, must be a table")
    merged = {
        kind: [{**default, **row} if isinstance(row, dict) else row for row in rows]
        if isinstance(rows, list)
        else rows
        for kind, rows in tables.items()
    }
    try:
        return Rows.model_validate(merged)
    except ValidationError as error:
        told = "; ".join(explain(problem) for problem in error.errors())
        raise RowsError(f"{path}: {told}") from None
