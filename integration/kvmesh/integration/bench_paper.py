"""The figures of the TurboQuant paper (arXiv 2504.19874, section 4), measured again.

D_mse(b) is E|u - u'|^2 over unit vectors, D_prod(b) is d * E(<y, u'> - <y, u>)^2 over unit u and y.
For large d both follow from the Lloyd-Max levels of a Gaussian: D_mse(b) is their mean squared
error, D_prod(b) = pi/2 * D_mse(b - 1) with D_mse(0) = 1. The paper prints two digits or fewer of
them, and computes its D_prod from its own rounded D_mse: 0.047 at 4 bits is pi/2 * 0.03.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.baselines.turboquant import TurboQuantMse, TurboQuantProd
from kvmesh.kernels.codebook import lloyd_max

BITS = (1, 2, 3, 4)
PRINTED_MSE = (0.36, 0.117, 0.03, 0.009)
PRINTED_PROD = (1.57, 0.56, 0.18, 0.047)
_DIM = 1024  # where the sphere is Gaussian to 0.1 %
_VECTORS = 2048
_SKETCHES = 8  # S of the QJL part; its own luck would show otherwise


@dataclass(frozen=True, slots=True)
class PaperRow:
    """quantity: D_mse or D_prod. printed: in the paper. exact: by its formula. measured: here."""

    quantity: str
    bits: int
    printed: float
    exact: float
    measured: float

    @property
    def error(self) -> float:
        """Of what was measured, relative to the formula."""
        return self.measured / self.exact - 1


def gaussian_distortion(bits: int) -> float:
    """The mean squared error of lloyd_max(bits) on N(0, 1): 1 - E c^2, as each level is a mean."""
    levels = lloyd_max(bits)
    borders = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
    above = [math.erfc(border / math.sqrt(2)) for border in borders]
    return 1 - sum(
        level**2 * (a - b) for level, (a, b) in zip(levels, itertools.pairwise(above), strict=True)
    )


def _unit(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    x = rng.standard_normal((_VECTORS, _DIM))
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def paper_rows(seed: int = 0, on_row: Callable[[], None] = lambda: None) -> Iterator[PaperRow]:
    """D_mse, then D_prod, at 1 to 4 bits."""
    rng = np.random.default_rng(seed)
    for bits, printed in zip(BITS, PRINTED_MSE, strict=True):
        u = _unit(rng)
        error = TurboQuantMse(bits).quantize_dequantize(u) - u
        yield PaperRow(
            "D_mse", bits, printed, gaussian_distortion(bits), float((error**2).sum(axis=1).mean())
        )
        on_row()
    for bits, printed in zip(BITS, PRINTED_PROD, strict=True):
        u, y = _unit(rng), _unit(rng)
        squares = []
        for sketch in range(_SKETCHES):
            error = TurboQuantProd(bits, 2 * sketch + 1).quantize_dequantize(u) - u
            squares.append(((error @ y[: _DIM // 2].T) ** 2).mean())
        coarse = gaussian_distortion(bits - 1) if bits > 1 else 1.0
        measured = _DIM * float(np.mean(squares))
        yield PaperRow("D_prod", bits, printed, math.pi / 2 * coarse, measured)
        on_row()
