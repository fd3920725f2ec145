"""Threads that kernels run on. Kernels hold no GIL, so Python's own threads are enough."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

_T = TypeVar("_T")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept for the life of the process: starting a thread costs more than a small decode."""
    return ThreadPoolExecutor(threads, "kvmesh-kernels")


def run_parts(run: Callable[[int, int], _T], parts: Sequence[tuple[int, int]]) -> list[_T]:
    """run(first, end) of every part, each on a thread of its own, the first on the caller's.

    Waits for all of them, also if one raises; then raises what the first such raised.
    """
    waiting = [_pool(len(parts) - 1).submit(run, *part) for part in parts[1:]]
    try:
        first = run(*parts[0])
    finally:
        done = [one.exception() for one in waiting]
    for error in done:
        if error is not None:
            raise error
    return [first, *(one.result() for one in waiting)]


def split(count: int, threads: int) -> list[tuple[int, int]]:
    """[first, end) of at most `threads` consecutive parts of like size, none of them empty."""
    cuts = [count * i // threads for i in range(threads + 1)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]
