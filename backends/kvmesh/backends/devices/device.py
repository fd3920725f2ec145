"""What a device file holds. Units are SI: bytes, seconds, FLOP/s, watts; prices in US dollars.

Tags say how far a number can be trusted: M measured, D datasheet, C claimed, X derived by
arithmetic, R recalled from the literature, U a user's own.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Tag = Literal["M", "D", "C", "X", "R", "U"]
TAGS = {
    "M": "measured", "D": "datasheet", "C": "claimed", "X": "derived", "R": "recalled", "U": "user",
}  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Section):
    """One number. taken_from: the device it was measured on, where this one has none of its own.
    fitted_on: the calibration rows that a fitted constant was fitted on."""

    value: Annotated[float, Field(allow_inf_nan=False)]
    tag: Tag
    source: Annotated[str, Field(min_length=1)]
    taken_from: str | None = None
    fitted_on: str | None = None


def _positive(figure: Figure) -> Figure:
    if figure.value <= 0:
        raise ValueError(f"is {figure.value:g}, must be greater than 0")
    return figure


def _not_negative(figure: Figure) -> Figure:
    if figure.value < 0:
        raise ValueError(f"is {figure.value:g}, must be at least 0")
    return figure


def _share(figure: Figure) -> Figure:
    if not 0 < figure.value <= 1:
        raise ValueError(f"is {figure.value:g}, must be greater than 0 and at most 1")
    return figure


def _count(figure: Figure) -> Figure:
    if figure.value < 1 or figure.value != int(figure.value):
        raise ValueError(f"is {figure.value:g}, must be a whole number of at least 1")
    return figure


Positive = Annotated[Figure, AfterValidator(_positive)]
NotNegative = Annotated[Figure, AfterValidator(_not_negative)]
Share = Annotated[Figure, AfterValidator(_share)]
Count = Annotated[Figure, AfterValidator(_count)]


class Memory(Section):
    bytes: Positive
    bandwidth_bytes_s: Positive
    reserved_bytes: NotNegative  # driver, runtime, workspaces: neither weights nor KV


class Link(Section):
    """bandwidth_bytes_s: one direction, per device. domain: devices that it joins."""

    bandwidth_bytes_s: Positive
    domain: Count | None = None
    latency_s: NotNegative | None = None


class Power(Section):
    """tgp_w: the package. all_in_w: its share of host, network, cooling and conversion too."""

    tgp_w: Positive | None = None
    all_in_w: Positive | None = None


class Prices(Section):
    """Dollars per device and hour by name of preset; `default` names the one used."""

    default: str
    per_hour: dict[str, Positive]

    @model_validator(mode="after")
    def _default_is_there(self) -> "Prices":
        if self.default not in self.per_hour:
            known = ", ".join(self.per_hour) or "none"
            raise ValueError(f"default is {self.default!r}, must be one of: {known}")
        return self


class GemmEfficiency(Section):
    """compute, memory: measured share of the peak, floor included; floor_s: the least time."""

    compute: Share
    memory: Share
    floor_s: NotNegative


class DecodeEfficiency(Section):
    memory: Share
    compute: Share
    floor_s: NotNegative


class MoeEfficiency(Section):
    """Of the expert GEMMs of a whole MoE layer; floor_s: routing, permutation and launches."""

    compute: Share
    memory: Share
    floor_s: NotNegative


class ElementwiseEfficiency(Section):
    memory: Share
    floor_s: NotNegative


class AllReduceEfficiency(Section):
    """Up to one_shot_bytes each rank reads all others' data at once, above in two steps."""

    link: Share
    floor_s: NotNegative
    one_shot_bytes: NotNegative


class AllToAllEfficiency(Section):
    link: Share
    dispatch_floor_s: NotNegative
    combine_floor_s: NotNegative


class Host(Section):
    """The gap between two steps: what the host does while the device waits."""

    step_s: NotNegative
    sequence_s: NotNegative  # for each sequence of the step


class Efficiency(Section):
    """Measured shares of the peaks. `scale` multiplies every share of math and memory."""

    scale: Positive
    gemm: dict[str, GemmEfficiency]
    context_attention: dict[str, Share]
    gqa_decode: dict[str, DecodeEfficiency]
    mla_decode: dict[str, DecodeEfficiency]
    moe: dict[str, MoeEfficiency]
    elementwise: ElementwiseEfficiency
    all_reduce: AllReduceEfficiency
    all_to_all: AllToAllEfficiency
    host: Host


class Chip(Section):
    """Geometry of an LPU chip; a vector has one byte per lane of all superlanes. See "Think Fast"
    (ISCA 2020), and lpu/chip.py for what its compiler makes of it. links: that share scale_up."""

    clock_hz: Positive
    superlanes: Count
    lanes_per_superlane: Count
    mem_slices: Count
    mem_slice_bytes: Count
    streams_per_direction: Count
    mxm_planes: Count
    weight_streams: Count
    vxm_alus: Count
    stagger_cycles: Count
    mxm_pipeline_cycles: Count
    mem_cycles: Count
    links: Count


class Device(Section):
    """One device. model: `op` has measured efficiencies, `roofline` peaks and links alone (an
    upper bound), `cycle` is for a cycle simulator and has no cost by op."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    title: str
    kind: Literal["gpu", "lpu"]
    architecture: str
    model: Literal["op", "roofline", "cycle"] = "op"
    notes: str = ""
    peak: dict[str, Positive]  # dense FLOP/s by dtype; `vector`: fp32 outside the matrix units
    memory: Memory
    scale_up: Link
    scale_out: Link
    power: Power = Power()
    price: Prices | None = None
    efficiency: Efficiency | None = None
    chip: Chip | None = None

    @model_validator(mode="after")
    def _complete(self) -> "Device":
        if self.model == "op" and self.efficiency is None:
            raise ValueError("efficiency is missing, which model = 'op' needs")
        if self.model == "cycle" and self.chip is None:
            raise ValueError("chip is missing, which model = 'cycle' needs")
        if self.chip is not None:
            size = self.chip.mem_slices.value * self.chip.mem_slice_bytes.value
            if size != self.memory.bytes.value:
                raise ValueError(
                    f"memory.bytes is {self.memory.bytes.value:.0f}, must be the {size:.0f} of "
                    "chip.mem_slices x chip.mem_slice_bytes"
                )
        return self

    @property
    def domain(self) -> int:
        """Devices that the scale-up link joins."""
        return int(self.scale_up.domain.value) if self.scale_up.domain else 1

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """(dotted path, figure) of every number in the file."""
        yield from _figures("", self)


def _figures(path: str, node: object) -> Iterator[tuple[str, Figure]]:
    if isinstance(node, Figure):
        yield path, node
        return
    parts = node.items() if isinstance(node, dict) else node if isinstance(node, Section) else ()
    for name, child in parts:
        yield from _figures(f"{path}.{name}" if path else str(name), child)
