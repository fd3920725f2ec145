"""Groq 3 (LP30) at roofline and link level only: its instructions and cycles are not public.

A bound from the data sheet's bandwidth, arithmetic and links, not a compiled schedule; real tokens
take longer.
"""

from dataclasses import dataclass
from math import ceil

from kvmesh.backends.lpu.program import ModelDoesNotFit
from kvmesh.backends.lpu.shapes import ModelShape, kv_bits


@dataclass(frozen=True, slots=True)
class RooflineChip:
    """Data-sheet figures of one LP30. tray_chips: that share a layer."""

    sram_bytes: int = 500_000_000
    sram_bytes_s: float = 150e12
    fp8_flops: float = 1.2e15
    links_bytes_s: float = 1.25e12  # one direction, all links: half of the 2.5 TB/s
    tray_chips: int = 8


@dataclass(frozen=True, slots=True)
class Roofline:
    """Least seconds per token of one user. chips: needed for the weights, one byte each, and K
    and V of that user."""

    chips: int
    memory_s: float
    compute_s: float
    links_s: float

    @property
    def seconds(self) -> float:
        return max(self.memory_s, self.compute_s) + self.links_s


def lp30_roofline(
    shape: ModelShape, codec: str, context: int, chips: int | None = None
) -> Roofline:
    """Layers one after another, each on one tray; two sums of the hidden state, FP16, per layer.

    Raises ModelDoesNotFit if `chips` are too few.
    """
    chip = RooflineChip()
    keys, values = kv_bits(codec, shape)
    cache = shape.num_layers * context * shape.kv_heads * shape.head_dim * (keys + values) / 8
    needed = ceil((shape.weights + cache) / chip.sram_bytes)
    if chips is not None and chips < needed:
        raise ModelDoesNotFit(
            f"{shape.name} at {context} tokens of {codec} does not fit {chips} LP30 of "
            f"{chip.sram_bytes // 10**6} MB; it needs {needed}"
        )
    group = min(chip.tray_chips, chips or needed)
    read = shape.weights - shape.vocab * shape.hidden  # of the embedding, one row is read
    attended = 2 * shape.num_layers * context * shape.heads * shape.head_dim
    moved = 2 * shape.num_layers * 2 * (group - 1) / group * shape.hidden * 2  # bytes, 2 phases
    return Roofline(
        chips=chips or needed,
        memory_s=(read + cache) / (group * chip.sram_bytes_s),
        compute_s=2 * (read + attended) / (group * chip.fp8_flops),
        links_s=moved / chip.links_bytes_s,
    )
