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
        rows = []
        computed, left = computed.copy(), left.copy()
        for _ in range(steps):
            drawn = self._rng.random(len(computed))
            said = 1 + (drawn[:, None] < self._reach).sum(axis=1)
            said = np.minimum(np.minimum(said, left), BLOCK_SIZE - computed % BLOCK_SIZE)
            rows.append(said)
            computed += said
            left -= said
            if not left.all():
                break
        return np.array(rows, np.int64)
