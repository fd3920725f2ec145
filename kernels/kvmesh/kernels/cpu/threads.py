"""Threads that kernels run on. Kernels hold no GIL, so Python's own threads are enough."""

import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import TypeVar

_T = TypeVar("_T")


class _Helpers:
    """Threads beside the caller's, kept: starting one costs more than a small decode.

    After a rest Linux may wake a helper on the very CPU that the caller is busy on, and leave it
    there for the whole of a decode, which then takes as long as with one thread. So before each
    call the helpers are forbidden the caller's CPU.
    """

    def __init__(self, threads: int) -> None:
        self._ids: list[int] = []
        self._allowed: set[int] = set()  # CPUs, before anything was forbidden
        self._pool = ThreadPoolExecutor(threads, "kvmesh-kernels", self._started)
        self._placed: tuple[int, int] | None = None  # the caller's CPU, how many helpers know it

    def _started(self) -> None:
        if sys.platform == "linux":
            self._allowed = os.sched_getaffinity(0)
        self._ids.append(threading.get_native_id())

    def submit(
        self, run: Callable[[int, int], _T], parts: Sequence[tuple[int, int]]
    ) -> list[Future[_T]]:
        self._keep_apart()
        return [self._pool.submit(run, *part) for part in parts]

    def _keep_apart(self) -> None:
        if sys.platform != "linux":
            return
        placed = current_cpu(), len(self._ids)
        if placed == self._placed:
            return
        others = self._allowed - {placed[0]}
        if others:
            for thread in self._ids[: placed[1]]:
                with suppress(OSError):  # not allowed here: then they run where they like
                    os.sched_setaffinity(thread, others)
        self._placed = placed


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def current_cpu() -> int:
    """The number of the CPU that the caller runs on; -1 where that cannot be known."""
    found = getattr(_libc(), "sched_getcpu", None)
    return -1 if found is None else int(found())


@cache
def _helpers(threads: int) -> _Helpers:
    return _Helpers(threads)


def run_parts(run: Callable[[int, int], _T], parts: Sequence[tuple[int, int]]) -> list[_T]:
    """run(first, end) of every part, each on a thread of its own, the first on the caller's.

    Waits for all of them, also if one raises; then raises what the first such raised.
    """
    waiting = _helpers(len(parts) - 1).submit(run, parts[1:]) if len(parts) > 1 else []
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
