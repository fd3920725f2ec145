"""The FFN of every layer on LPU chips, the rest of the model elsewhere."""

import functools
from dataclasses import dataclass
from math import ceil

from kvmesh.backends.lpu.compile import CHIP, compile_ffn
from kvmesh.backends.lpu.program import ModelDoesNotFit
from kvmesh.backends.lpu.shapes import ModelShape

_WIDE = 8  # tokens of one program


@dataclass(frozen=True, slots=True)
class FfnClock:
    """chips: groups of `group` that share a layer, as many as hold all layers' FFNs. layer, token:
    cycles of one layer for no token (by the line through two programs) and for each token."""

    chips: int
    group: int
    layers: int
    layer: float
    token: float

    def seconds(self, tokens: int) -> float:
        """Of all layers, one after another, without the way to the chips and back."""
        return self.layers * (self.layer + self.token * tokens) / CHIP.clock_hz if tokens else 0.0


@functools.lru_cache(maxsize=16)
def ffn_clock(shape: ModelShape) -> FfnClock:
    """Compiles two programs, on as few chips as hold the FFNs and as wide as that allows.

    Raises ModelDoesNotFit for a layer that no node holds.
    """
    group, stages = _place(shape)
    one, wide = (compile_ffn(shape, group, tokens).execution.cycles for tokens in (1, _WIDE))
    token = (wide - one) / (_WIDE - 1)
    return FfnClock(group * stages, group, shape.num_layers, one - token, token)


def _place(shape: ModelShape) -> tuple[int, int]:
    """(chips of a group, groups)."""
    found = []
    for group in range(1, CHIP.node_chips + 1):
        held = CHIP.data_bytes // ffn_bytes(shape, group)  # layers
        if held:
            found.append((group * ceil(shape.num_layers / held), -group))
    if not found:
        raise ModelDoesNotFit(
            f"the FFN of a layer of {shape.name} has {3 * shape.hidden * shape.ffn >> 20} MiB of "
            f"weights, more than the {CHIP.node_chips} chips of a node hold"
        )
    chips, negative = min(found)
    return -negative, chips // -negative


def ffn_bytes(shape: ModelShape, group: int) -> int:
    """INT8 weights of one layer's FFN on one chip of a group."""
    return 3 * shape.hidden * ceil(shape.ffn / group)
