"""One step of online softmax for four rows at once, emitted as vectors.

Each row's chain of operations is long and serial: its maximum, what the sum so far fades by, the
factor of its rounding. Side by side in the lanes of one vector they take as long as one of them.
"""

from typing import Any

from llvmlite import ir
from numba import types

from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.lanes import SMALLEST, set_whole
from kvmesh.kernels.cpu.vectors import FLOAT, I32, I64, INT, WIDTH, Emitter, function
from kvmesh.kernels.layout import BLOCK_SIZE

_TILE = range(0, BLOCK_SIZE, WIDTH)


def _across(b: Any, rows: list[Any], join: Any) -> Any:
    """Four vectors of eight become one of four, a row in each lane, joined as Emitter.reduce does:
    the first half with the last."""

    def mix(x: Any, y: Any, order: list[int]) -> Any:
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, 4), order))

    halves = [join(mix(x, x, [0, 1, 2, 3]), mix(x, x, [4, 5, 6, 7])) for x in rows]
    low, high = (
        join(mix(x, y, [0, 1, 4, 5]), mix(x, y, [2, 3, 6, 7])) for x, y in (halves[:2], halves[2:])
    )
    return join(mix(low, high, [0, 2, 4, 6]), mix(low, high, [1, 3, 5, 7]))


class _Step:
    """at: vectors of eight elements of a row; four: of one element of each row."""

    def __init__(self, b: Any, scores: Any, scales: Any) -> None:
        self.b, self.at, self.four = b, Emitter(b), Emitter(b, simd.ROWS)
        self.scores, self.scales = scores, scales

    def scores_of(self, row: int) -> list[Any]:
        return [self.at.load(FLOAT, self.scores, I64(row * BLOCK_SIZE + i)) for i in _TILE]

    def lane(self, vector: Any, row: int) -> Any:
        """A row's element, in every lane of eight."""
        order = ir.Constant(ir.VectorType(I32, WIDTH), [row] * WIDTH)
        return self.b.shuffle_vector(vector, vector, order)

    def powers(self, row: int, base: Any, seen: Any) -> tuple[Any, Any]:
        """Scores become 2^(score - base) * scale. Returns the powers' sum, and the largest of the
        products, none of which is negative; in eight parts each."""
        b, at = self.b, self.at
        top, seen = self.lane(base, row), self.lane(seen, row)
        scores = self.scores_of(row)
        powers: list[Any] = []
        for some in (scores[:4], scores[4:]):
            powers += at.exp2([b.fsub(x, top) for x in some])
        powers = [b.select(seen, x, at.real(0.0)) for x in powers]
        products = []
        for i, power in zip(_TILE, powers, strict=True):
            products.append(b.fmul(power, at.load(FLOAT, self.scales, I64(i))))
            at.store(FLOAT, products[-1], self.scores, I64(row * BLOCK_SIZE + i))
        return at.fold(powers, b.fadd), at.fold(products, at.larger)

    def rounded(self, row: int, factor: Any, outs: tuple[Any, Any, Any]) -> Any:
        """Writes a row of weights; returns the sum of them, in eight parts."""
        factor = self.lane(factor, row)
        wholes = []
        for i, x in zip(_TILE, self.scores_of(row), strict=True):
            place = I64(row * BLOCK_SIZE + i)
            wholes.append(set_whole(self.at, self.b.fmul(x, factor), outs, place))
        return self.at.fold(wholes, self.b.add)


def _weigh(
    b: Any, scores: Any, scales: Any, peak: Any, total: Any, fades: Any, wide: Any, high: Any,
    low: Any, unit: Any, offset: Any,
) -> None:  # fmt: skip
    step, rows, zero = _Step(b, scores, scales), range(simd.ROWS), I64(0)
    at, four = step.at, step.four
    before = four.load(FLOAT, peak, zero)
    tops = [at.fold(step.scores_of(row), at.larger) for row in rows]
    largest = four.larger(_across(b, tops, four.larger), before)
    four.store(FLOAT, largest, peak, zero)
    seen = b.fcmp_ordered(">", largest, four.real(float("-inf")))
    base = b.select(seen, largest, four.real(0.0))  # a row that saw nothing yet has only zeros
    fade = four.exp2([b.fsub(before, base)])[0]
    four.store(FLOAT, fade, fades, zero)
    sums, products = zip(*(step.powers(row, base, seen) for row in rows), strict=True)
    sofar = b.fmul(four.load(FLOAT, total, zero), fade)
    four.store(FLOAT, b.fadd(sofar, _across(b, list(sums), b.fadd)), total, zero)
    most = _across(b, list(products), four.larger)
    four.store(FLOAT, b.fmul(most, four.real(1 / simd.LARGEST)), unit, zero)
    some = b.fcmp_ordered(">", most, four.real(SMALLEST))
    factor = b.select(some, b.fdiv(four.real(float(simd.LARGEST)), most), four.real(0.0))
    wholes = [step.rounded(row, factor, (wide, high, low)) for row in rows]
    whole = b.mul(_across(b, wholes, b.add), four.integer(255))
    four.store(I32, whole, offset, zero)


# fp32 scores [4, 64] become weights 2^(score - peak), which times fp32 scales [64] are rounded to
# four rows of dot.py's Weights; peak and total [4] are brought up to date, fades [4] are what the
# sums so far are to be multiplied by.
# (scores, scales, peak, total, fades, wide, high, low, unit, offset)
weigh_rows = function("weigh_rows", _weigh, types.none, [INT] * 10)
