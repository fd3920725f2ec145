"""How fast this machine reads and copies memory: what a kernel's bandwidth is compared with."""

from typing import Any

import numpy as np
import numpy.typing as npt

from kvmesh.kernels.cpu.jit import entry
from kvmesh.kernels.cpu.threads import run_parts, split

Words = npt.NDArray[np.int64]


@entry
def _total(memory: Any) -> Any:
    """Integers, so that the sum is made of vectors without any leave to reorder it."""
    total = np.int64(0)
    for i in range(memory.size):
        total += memory[i]
    return total


def read(memory: Words, threads: int) -> int:
    """The sum of int64 [any], each thread reading its part from end to end."""
    sums = run_parts(lambda a, b: int(_total(memory[a:b])), split(memory.size, threads))
    return sum(sums)


def copy(source: Words, target: Words, threads: int) -> None:
    """target = source, int64 [any], each thread its part."""
    run_parts(lambda a, b: np.copyto(target[a:b], source[a:b]), split(source.size, threads))
