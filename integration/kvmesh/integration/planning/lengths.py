"""Lengths of prompts and outputs as distributions: what a workload file says, its moments, draws.

All sums are over a fixed grid of quantiles, so that a mean is a number and not an estimate.
"""

import math
from functools import cached_property
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

Floats = npt.NDArray[np.float64]
Tokens = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_GRID = (np.arange(4096) + 0.5) / 4096


class Lengths(BaseModel):
    """Tokens of a prompt or an output; one of:

    fixed: always so many. log_normal: median and sigma (of the logarithm), cut at low and high.
    quantiles: (share, tokens) points, linear between them. mean: scales the last two to it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["fixed", "log_normal", "quantiles"]
    tokens: Tokens | None = None
    median: Tokens | None = None
    sigma: Annotated[float, Field(gt=0, le=4)] | None = None
    low: Tokens = 1
    high: Tokens = 1e7
    points: tuple[tuple[Annotated[float, Field(ge=0, le=1)], Tokens], ...] = ()
    mean_tokens: Tokens | None = None

    @model_validator(mode="after")
    def _complete(self) -> "Lengths":
        needed = {
            "fixed": ("tokens",), "log_normal": ("median", "sigma"), "quantiles": ("points",),
        }[self.kind]  # fmt: skip
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"{name} is missing, which kind = {self.kind!r} needs")
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, must be at most high = {self.high:g}")
        if self.points:
            shares, values = zip(*self.points, strict=True)
            if shares[0] != 0 or shares[-1] != 1:
                raise ValueError("points must begin at the share 0 and end at the share 1")
            if list(shares) != sorted(set(shares)) or list(values) != sorted(values):
                raise ValueError("points must rise in shares and in tokens")
        return self

    @classmethod
    def of(cls, tokens: float) -> "Lengths":
        return cls(kind="fixed", tokens=tokens)

    def _raw(self, shares: Floats) -> Floats:
        if self.kind == "fixed":
            return np.full(shares.shape, self.tokens, np.float64)
        if self.kind == "quantiles":
            known, values = zip(*self.points, strict=True)
            return np.asarray(np.interp(shares, known, values), np.float64)
        assert self.median is not None and self.sigma is not None
        normal = NormalDist(math.log(self.median), self.sigma)
        drawn = np.exp([normal.inv_cdf(share) for share in shares.tolist()])
        return np.clip(drawn, self.low, self.high)

    @cached_property
    def _scale(self) -> float:
        return self.mean_tokens / float(self._raw(_GRID).mean()) if self.mean_tokens else 1.0

    def at(self, shares: Floats) -> Floats:
        """Tokens at each share (0..1, both excluded) of the distribution, at least 1, not rounded;
        what is scaled to a mean may not pass the greatest length."""
        most = self.points[-1][1] if self.points else self.high
        return np.clip(self._raw(shares) * self._scale, 1.0, most)

    @cached_property
    def grid(self) -> Floats:
        """4,096 equally likely lengths, ascending."""
        return self.at(_GRID)

    @property
    def mean(self) -> float:
        return float(self.grid.mean())

    @property
    def square(self) -> float:
        """Mean of the squares."""
        return float((self.grid**2).mean())

    @property
    def biased(self) -> float:
        """E[L^2] / 2 E[L]: how far a running one is on average, and how much it has left."""
        return self.square / (2 * self.mean)

    @property
    def longest(self) -> float:
        return float(self.grid[-1])

    def left(self, steps: Floats) -> tuple[Floats, Floats]:
        """Of those running at some moment: (share still running `steps` tokens later, mean tokens
        that these had done at that moment)."""
        rest = np.maximum(self.grid[None, :] - steps[:, None], 0.0)
        total = rest.sum(axis=1)
        done = (rest**2).sum(axis=1) / 2 / np.maximum(total, 1e-12)
        return total / self.grid.sum(), done

    def draw(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """`count` lengths, rounded to whole tokens."""
        shares = np.clip(rng.random(count), 1e-9, 1 - 1e-9)
        return np.maximum(1, np.rint(self.at(shares))).astype(np.int64)
