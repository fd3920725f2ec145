"""An op as a term: seconds of math, memory and links, linear in the step.

seconds of a term = max(math, memory, links) + floor. Each part is a sum of coefficient x feature
(see shapes.F), so a whole step is one small matrix product. Sources of the rates: rates.py.
"""

from dataclasses import dataclass, field

from kvmesh.backends.architectures import WEIGHT_BYTES, ModelShape
from kvmesh.backends.architectures.shape import Matrix
from kvmesh.backends.cost.parallel import Formats, Options, Parallel
from kvmesh.backends.cost.rates import Rate, Rates
from kvmesh.backends.cost.shapes import F
from kvmesh.backends.devices.device import Device

Coefficients = dict[F, float]


@dataclass(frozen=True, slots=True)
class Term:
    """One op, all its layers together. Coefficients are seconds per unit of a feature; flops and
    bytes are units per unit, for people."""

    name: str
    math: Coefficients = field(default_factory=dict)
    memory: Coefficients = field(default_factory=dict)
    link: Coefficients = field(default_factory=dict)
    floor: Coefficients = field(default_factory=dict)
    flops: Coefficients = field(default_factory=dict)
    bytes: Coefficients = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the terms of a step are built from; the same for every step of an instance."""

    device: Device
    model: ModelShape
    parallel: Parallel
    formats: Formats
    options: Options
    rates: Rates
    width: int  # query tokens of a decoding sequence: 1 and the drafts

    def term(
        self, name: str, rate: Rate, flops: Coefficients, moved: Coefficients, floor: Coefficients
    ) -> Term:
        return Term(
            name,
            {f: value / rate.flops_s for f, value in flops.items()},
            {f: value / rate.bytes_s for f, value in moved.items()},
            {},
            {f: value * rate.floor_s for f, value in floor.items()},
            flops,
            moved,
        )

    def gemm(self, name: str, matrix: Matrix, weights: str, count: float) -> Term:
        """`count` products of the step's tokens with a matrix of this format."""
        read = matrix.inputs * self.rates.activation_bytes(weights) + matrix.outputs * 2
        return self.term(
            name,
            self.rates.gemm(weights),
            {F.TOKENS: 2 * matrix.elements * count},
            {F.ANY: matrix.elements * WEIGHT_BYTES[weights] * count, F.TOKENS: read * count},
            {F.ANY: count},
        )

    def elementwise(self, name: str, token_bytes: float, count: float, kernels: float = 1) -> Term:
        moved = {F.TOKENS: token_bytes * count}
        return self.term(name, self.rates.elementwise(), {}, moved, {F.ANY: count * kernels})
