"""One step of online softmax for four rows at once, emitted as vectors: dots to weights.

Each row's chain of operations is long and serial: its maximum, what the sum so far fades by, the
factor of its rounding. Side by side in the lanes of one vector they take as long as one of them.
Where nothing comes between scores and softmax, both are one function, and scores stay in registers.
"""

from functools import partial
from typing import Any

from numba import types

from kvmesh.kernels.cpu import simd
from kvmesh.kernels.cpu.lanes import set_whole, tile_rows, unit_and_factor
from kvmesh.kernels.cpu.vectors import FLOAT, I32, I64, INT, REAL, WIDE, Emitter, function
from kvmesh.kernels.layout import BLOCK_SIZE

_ROWS = range(simd.ROWS)


def _across(b: Any, rows: list[Any], join: Any) -> Any:
    """Four vectors become one of four, a row in each lane, joined as Emitter.reduce does: the first
    half with the last."""

    mix = partial(simd.shuffle, b)
    width = rows[0].type.count
    while width > 4:
        width //= 2
        first, last = list(range(width)), list(range(width, 2 * width))
        rows = [join(mix(x, x, first), mix(x, x, last)) for x in rows]
    low, high = (
        join(mix(x, y, [0, 1, 4, 5]), mix(x, y, [2, 3, 6, 7])) for x, y in (rows[:2], rows[2:])
    )
    return join(mix(low, high, [0, 2, 4, 6]), mix(low, high, [1, 3, 5, 7]))


class _Rows:
    """Four rows of 64 elements. at: vectors of a row's elements; four: of one of each row."""

    def __init__(self, b: Any) -> None:
        self.b, self.at, self.four = b, Emitter(b, WIDE), Emitter(b, simd.ROWS)

    def lane(self, vector: Any, row: int) -> Any:
        """A row's element, in every lane."""
        return simd.shuffle(self.b, vector, vector, [row] * WIDE)

    def load(self, scores: Any) -> list[list[Any]]:
        places = [[self.b.add(I64(row * BLOCK_SIZE), i) for i in tile_rows()] for row in _ROWS]
        return [[self.at.load(FLOAT, scores, i) for i in row] for row in places]

    def store(self, rows: list[list[Any]], scores: Any) -> None:
        for row, vectors in enumerate(rows):
            for i, x in zip(tile_rows(), vectors, strict=True):
                self.at.store(FLOAT, x, scores, self.b.add(I64(row * BLOCK_SIZE), i))

    def scores(
        self, dots: Any, stride: Any, scales: Any, unit: Any, query: tuple[Any, Any, Any]
    ) -> list[list[Any]]:
        """bias + scale * unit * (2 dots - offset). query: addresses of the rows' units, offsets and
        biases; unit: what multiplies all of their units."""
        b, at, four = self.b, self.at, self.four
        units, offsets, biases = (
            four.load(kind, x, I64(0)) for kind, x in zip((FLOAT, I32, FLOAT), query, strict=True)
        )
        units = b.fmul(units, four.spread(unit))
        factors = [at.load_halves(scales, i) for i in tile_rows()]
        rows = []
        for row in _ROWS:
            one, offset, bias = (self.lane(x, row) for x in (units, offsets, biases))
            first = b.mul(stride, I64(row))
            found = [at.load(I32, dots, b.add(first, i)) for i in tile_rows()]
            found = [b.fmul(at.centered(x, offset), one) for x in found]
            rows.append([at.fused(x, y, bias) for x, y in zip(found, factors, strict=True)])
        return rows

    def powers(self, scores: list[Any], base: Any, seen: Any) -> list[Any]:
        """2^(score - base), or zeros where nothing was seen."""
        b, at = self.b, self.at
        powers: list[Any] = []
        for i in range(0, len(scores), 4):
            powers += at.exp2([b.fsub(x, base) for x in scores[i : i + 4]])
        return [b.select(seen, x, at.real(0.0)) for x in powers]

    def weigh(
        self, rows: list[list[Any]], scales: Any, state: tuple[Any, Any, Any], outs: Any
    ) -> None:
        """state: addresses of peak, total and fades; outs: of four rows of dot.py's Weights."""
        b, at, four, zero = self.b, self.at, self.four, I64(0)
        peak, total, fades = state
        before = four.load(FLOAT, peak, zero)
        tops = [at.fold(scores, at.larger) for scores in rows]
        largest = four.larger(_across(b, tops, four.larger), before)
        four.store(FLOAT, largest, peak, zero)
        seen = b.fcmp_ordered(">", largest, four.real(float("-inf")))
        base = b.select(seen, largest, four.real(0.0))  # a row that saw nothing yet has only zeros
        fade = four.exp2([b.fsub(before, base)])[0]
        four.store(FLOAT, fade, fades, zero)
        factors = [at.load_halves(scales, i) for i in tile_rows()]
        sums, products = [], []
        for row, scores in enumerate(rows):
            powers = self.powers(scores, self.lane(base, row), self.lane(seen, row))
            sums.append(at.fold(powers, b.fadd))
            products.append([b.fmul(x, y) for x, y in zip(powers, factors, strict=True)])
        sofar = b.fmul(four.load(FLOAT, total, zero), fade)
        four.store(FLOAT, b.fadd(sofar, _across(b, sums, b.fadd)), total, zero)
        self._round(products, outs)

    def _round(self, products: list[list[Any]], outs: Any) -> None:
        """None of the products is negative."""
        b, at, four, zero = self.b, self.at, self.four, I64(0)
        *places, unit, offset = outs
        most = _across(b, [at.fold(x, at.larger) for x in products], four.larger)
        of_one, scale = unit_and_factor(four, most)
        four.store(FLOAT, of_one, unit, zero)
        sums = []
        for row, vectors in enumerate(products):
            factor, wholes = self.lane(scale, row), []
            for i, x in zip(tile_rows(), vectors, strict=True):
                place = b.add(I64(row * BLOCK_SIZE), i)
                wholes.append(set_whole(at, b.fmul(x, factor), places, place))
            sums.append(at.fold(wholes, b.add))
        whole = b.mul(_across(b, sums, b.add), four.integer(255))
        four.store(I32, whole, offset, zero)


def _score(
    b: Any, dots: Any, stride: Any, scales: Any, unit: Any, units: Any, offsets: Any, biases: Any,
    out: Any,
) -> None:  # fmt: skip
    rows = _Rows(b)
    rows.store(rows.scores(dots, stride, scales, unit, (units, offsets, biases)), out)


def _weigh(
    b: Any, scores: Any, scales: Any, peak: Any, total: Any, fades: Any, wide: Any, high: Any,
    low: Any, unit: Any, offset: Any,
) -> None:  # fmt: skip
    rows = _Rows(b)
    outs = (wide, high, low, unit, offset)
    rows.weigh(rows.load(scores), scales, (peak, total, fades), outs)


def _score_and_weigh(
    b: Any, dots: Any, stride: Any, key_scales: Any, key_unit: Any, units: Any, offsets: Any,
    biases: Any, scales: Any, peak: Any, total: Any, fades: Any, wide: Any, high: Any, low: Any,
    unit: Any, offset: Any,
) -> None:  # fmt: skip
    rows = _Rows(b)
    scores = rows.scores(dots, stride, key_scales, key_unit, (units, offsets, biases))
    rows.weigh(scores, scales, (peak, total, fades), (wide, high, low, unit, offset))


# int32 dots [4, stride] become fp32 scores [4, 64] = bias + scale * unit * (2 dots - offset).
# (dots, stride, fp16 scales [64], unit that multiplies units, units, offsets, biases [4], scores)
score_rows = function(
    "score_rows", _score, types.none, [INT] * 3 + [REAL] + [INT] * 4
)  # fmt: skip
# fp32 scores [4, 64] become weights 2^(score - peak), which times fp16 scales [64] are rounded to
# four rows of dot.py's Weights; peak and total [4] are brought up to date, fades [4] are what the
# sums so far are to be multiplied by.
# (scores, scales, peak, total, fades, wide, high, low, unit, offset)
weigh_rows = function("weigh_rows", _weigh, types.none, [INT] * 10)
# One after the other: the arguments of the first but the last, those of the second but the first.
score_and_weigh_rows = function(
    "score_and_weigh_rows", _score_and_weigh, types.none, [INT] * 3 + [REAL] + [INT] * 12
)  # fmt: skip
