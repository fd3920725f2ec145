"""How a model is laid over devices, and what of it each rank has."""

from dataclasses import dataclass
from typing import Literal

from kvmesh.backends.architectures import KV_FORMATS, WEIGHT_BYTES, ModelShape
from kvmesh.backends.errors import ShapeError


@dataclass(frozen=True, slots=True)
class Parallel:
    """One instance of a model: tensor * data * pipeline devices.

    tensor: ranks that split heads and FFN. data: replicas of attention, each with sequences of its
    own (attention data parallel). expert: ranks among tensor * data that the experts are spread
    over; what remains splits each expert. pipeline: stages of layers.
    """

    tensor: int = 1
    data: int = 1
    expert: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "data", "expert", "pipeline"):
            value = getattr(self, name)
            if value < 1:
                raise ShapeError(f"parallel.{name} is {value}, must be at least 1")
        if self.group % self.expert:
            raise ShapeError(
                f"parallel.expert is {self.expert}, must divide tensor * data = {self.group}"
            )

    @property
    def group(self) -> int:
        """Ranks of one stage."""
        return self.tensor * self.data

    @property
    def devices(self) -> int:
        return self.group * self.pipeline

    @property
    def expert_split(self) -> int:
        """Ranks that share each expert."""
        return self.group // self.expert

    @property
    def exchanges(self) -> bool:
        """Whether tokens travel to their experts (else an all-reduce joins the parts)."""
        return self.data > 1 and self.expert > 1


@dataclass(frozen=True, slots=True)
class Formats:
    """Numbers in memory. weights: of the matrices (WEIGHT_BYTES). attention: of the attention
    projections, if it is another. kv: KV_FORMATS, fp8 or a codec by name."""

    weights: str = "bf16"
    kv: str = "fp16"
    attention: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("weights", self.weights), ("attention", self.attention)):
            if value is not None and value not in WEIGHT_BYTES:
                known = ", ".join(WEIGHT_BYTES)
                raise ShapeError(f"formats.{name} is {value!r}, must be one of {known}")
        if self.kv not in KV_FORMATS:
            known = ", ".join(KV_FORMATS)
            raise ShapeError(f"formats.kv is {self.kv!r}, must be one of {known}")

    @property
    def projections(self) -> str:
        return self.attention or self.weights


@dataclass(frozen=True, slots=True)
class Options:
    """How a step is run. routing: how tokens choose experts: balanced (all alike and exactly
    even), by a power law (alpha 1.2), or placed (by a power law too, but the experts are placed so
    that every rank has as much to do).
    draft_tokens: drafted by multi-token prediction and verified for each decoding sequence.
    fused: small ops joined with their neighbours; without, two more kernels per norm.
    overlap: an all-reduce runs under the product before it, as one kernel of both does.
    exchange: how experts' outputs travel back, in bf16 or in fp8."""

    routing: Literal["balanced", "placed", "power_law"] = "balanced"
    draft_tokens: int = 0
    fused: bool = True
    overlap: bool = False
    exchange: Literal["bf16", "fp8"] = "bf16"

    def __post_init__(self) -> None:
        if self.routing not in ("balanced", "placed", "power_law"):
            raise ShapeError(f"routing is {self.routing!r}, must be balanced, placed or power_law")
        if self.exchange not in ("bf16", "fp8"):
            raise ShapeError(f"exchange is {self.exchange!r}, must be bf16 or fp8")
        if self.draft_tokens < 0:
            raise ShapeError(f"draft_tokens is {self.draft_tokens}, must be at least 0")


def check_parallel(model: ModelShape, parallel: Parallel) -> None:
    """Raises ShapeError naming the degree that does not go with the model."""
    p, name = parallel, model.name
    if model.heads % p.tensor:
        raise ShapeError(
            f"parallel.tensor is {p.tensor}, must divide the {model.heads} heads of {name}"
        )
    if p.pipeline > model.layers:
        raise ShapeError(
            f"parallel.pipeline is {p.pipeline}, must be at most the {model.layers} layers "
            f"of {name}"
        )
    if model.moe is None:
        if p.expert > 1:
            raise ShapeError(f"parallel.expert is {p.expert}, must be 1: {name} has no experts")
        return
    if p.expert > model.moe.experts:
        raise ShapeError(
            f"parallel.expert is {p.expert}, must be at most the {model.moe.experts} experts "
            f"of {name}"
        )
    if p.data > 1 and p.expert == 1:
        raise ShapeError(
            f"parallel.expert is 1 with data = {p.data}, must be greater: the experts of {name} "
            "are spread over the attention replicas, or each replica is an instance of its own"
        )
