"""Exact merging of attention over parts of a context, wherever each part was attended to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention of some queries over some of their tokens.

    output: fp32 [..., D], normalised over these tokens. max: fp32 [...], the largest score.
    log_sum: fp32 [...], log of the sum of exp(score - max). A query that saw nothing has max -inf.
    """

    output: Floats
    max: Floats
    log_sum: Floats


def merge(parts: Sequence[Partial]) -> Partial:
    """The attention over all parts' tokens, which no two parts share.

    o = sum w_i o_i / sum w_i with w_i = exp(max_i + log_sum_i - max). Adds up in the order given.

    Raises ValueError without parts, or if their shapes differ.
    """
    if not parts:
        raise ValueError("nothing to merge, give at least one part")
    shapes = {part.output.shape for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"parts have outputs of shapes {sorted(shapes)}, must all be the same")
    top = np.max([part.max for part in parts], axis=0)
    seen = top > -np.inf
    shift = np.where(seen, top, np.float32(0))
    output = np.zeros(parts[0].output.shape, np.float32)
    total = np.zeros(top.shape, np.float32)
    for part in parts:
        weight = np.exp(part.max + part.log_sum - shift)  # exp(-inf) = 0 for what saw nothing
        output += weight[..., None] * part.output
        total += weight
    total[~seen] = 1
    np.divide(output, total[..., None], out=output)
    return Partial(output, top, np.asarray(np.log(total), np.float32))
