"""The file beside a checkpoint that says which codec each layer bears, and how that was measured.

`kvmesh model check` writes it, a worker reads it. It holds for one model: a check of another is
refused, because its figures say nothing about what would be served.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvmesh.backends.errors import CheckpointError
from kvmesh.kernels.block import FORMAT_VERSION
from kvmesh.kernels.codebook import CODEBOOK_VERSION
from kvmesh.kernels.layout import CODECS

CODEC_FILE = "kvmesh-codec.json"
BLOCK_FORMAT = f"{FORMAT_VERSION}.{CODEBOOK_VERSION}"  # of blocks, and of their codebooks

Nats = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(gt=0)]


class Record(BaseModel):
    """Immutable, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Loss(Record):
    """What storing K and V so costs, against fp16 on the same tokens.

    kl_nats: mean of KL(fp16 || this) of the next-token distributions. kl_p99_nats: 99 % of the
    positions are below. top1: share of positions with the same most likely token. bytes_per_token:
    of K and V in all layers, scales included, block headers not.
    """

    kl_nats: Nats
    kl_p99_nats: Nats
    top1: Annotated[float, Field(ge=0, le=1)]
    bytes_per_token: Bytes


class CodecCheck(Record):
    """One check of one model.

    fingerprint: of the model, hex. prompts: which were used. positions: that were compared.
    codec, layer_codecs: the assignment; layer_codecs has one entry per layer. chosen: measured
    under it. uniform: measured with one codec in all layers. layers: for each codec, the KL in nats
    with only that layer stored so, layer by layer.
    """

    format: Literal[1] = 1
    model: str
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    block_format: str
    prompts: str
    positions: Annotated[int, Field(gt=0)]
    budget_nats: Annotated[float, Field(gt=0)]
    codec: str
    layer_codecs: Annotated[tuple[str, ...], Field(min_length=1)]
    chosen: Loss
    uniform: dict[str, Loss]
    layers: dict[str, tuple[Nats, ...]]

    @model_validator(mode="after")
    def _known(self) -> "CodecCheck":
        for codec in (self.codec, *self.layer_codecs):
            if codec not in CODECS:
                raise ValueError(f"codec is {codec!r}, must be one of {', '.join(CODECS)}")
        return self


def read_check(path: Path) -> CodecCheck | None:
    """The check at `path`; None if there is no such file.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        return CodecCheck.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise CheckpointError(
            f"{path}: is not a codec check: {where}: {first['msg']}; "
            "run 'kvmesh model check' to write it anew"
        ) from error


def write_check(path: Path, check: CodecCheck) -> None:
    """Replaces the file at once, so that no reader sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(check.model_dump_json(indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def refuse_foreign(check: CodecCheck, fingerprint: bytes, source: object) -> None:
    """Raises CheckpointError if the check is of another model."""
    if check.fingerprint != fingerprint.hex():
        raise CheckpointError(
            f"{source}: is of the model with fingerprint {check.fingerprint}, this one has "
            f"{fingerprint.hex()}; run 'kvmesh model check' again, or set a codec"
        )
