"""Multi-token prediction: how many tokens a sequence gets from a step."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.layout import BLOCK_SIZE

Counts = npt.NDArray[np.int64]


class Drafts:
    """Draws how many drafts are accepted. A draft never crosses a block's border.

    acceptance: chance of the draft at each position, if those before it were accepted.
    """

    def __init__(self, acceptance: Sequence[float], rng: np.random.Generator) -> None:
        self._reach = np.cumprod(np.asarray(acceptance, np.float64))
        self._rng = rng

    @property
    def width(self) -> int:
        """Most tokens of a sequence per step."""
        return 1 + len(self._reach)

    def run(self, computed: Counts, left: Counts, steps: int) -> Counts:
        """Tokens of each sequence in each step, int64 [steps or less, sequences].

        computed, left: of each sequence, its computed tokens, and its output tokens until it ends.
        Stops with the step in which the first one ends.
        """
        drawn = self._rng.random((steps, len(computed)))
        said = np.ones(drawn.shape, np.int64)
        for chance in self._reach:
            said += drawn < chance
        computed, left = computed.copy(), left.copy()
        for step, row in enumerate(said):
            np.minimum(row, BLOCK_SIZE - computed % BLOCK_SIZE, out=row)
            np.minimum(row, left, out=row)
            computed += row
            left -= row
            if not left.all():
                return said[: step + 1]
        return said
