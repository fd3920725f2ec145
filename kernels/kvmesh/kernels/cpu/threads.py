"""Threads that kernels run on. Kernels hold no GIL, so Python's own threads are enough."""

import itertools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from numba import types

from kvmesh.kernels.cpu.jit import entry

_T = TypeVar("_T")


class _Helper:
    """A thread that is kept: starting one costs more than a small decode.

    Two locks hand it its work and back what came of it; a queue and a future would take three times
    as long, of which a decode of few tokens would notice most.
    """

    def __init__(self) -> None:
        self._go, self._done = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._done.acquire()
        self._work: Callable[[], Any] | None = None
        self._error: BaseException | None = None
        self._result: Any = None
        self._id = 0
        self._allowed: set[int] = set()  # CPUs, before anything was forbidden
        self._caller = -1  # the CPU that is forbidden
        threading.Thread(target=self._serve, name="kvmesh-kernels", daemon=True).start()

    def start(self, work: Callable[[], Any], caller: int) -> None:
        """caller: the CPU that the caller is on, -1 if that is not known."""
        if caller != self._caller:
            self._keep_off(caller)
        self._work = work
        self._go.release()

    def wait(self) -> tuple[Any, BaseException | None]:
        """What the work returned, or what it raised."""
        self._done.acquire()
        found = self._result, self._error
        self._work = self._result = self._error = None
        return found

    def _serve(self) -> None:
        self._id = threading.get_native_id()
        if sys.platform == "linux":
            self._allowed = os.sched_getaffinity(0)
        while True:
            self._go.acquire()
            try:
                if self._work is not None:
                    self._result = self._work()
            except BaseException as error:  # raised again where the work is waited for
                self._error = error
            self._done.release()

    def _keep_off(self, caller: int) -> None:
        """After a rest Linux may wake a helper on the very CPU that the caller is busy on, and
        leave it there for the whole of a decode, which then takes as long as with one thread."""
        others = self._allowed - {caller}
        if self._id and others:
            with suppress(OSError):  # not allowed here: then it runs where it likes
                os.sched_setaffinity(self._id, others)
        if self._id:
            self._caller = caller


_IDLE: list[_Helper] = []  # taken and given back by whoever runs something, on any thread


if sys.platform == "linux":
    _getcpu: Any = types.ExternalFunction("sched_getcpu", types.int32())

    @entry
    def current_cpu() -> int:
        """The number of the CPU that the caller runs on. Compiled, as ctypes takes longer to enter
        when the caches are empty, and what enters a kernel is needed in any case."""
        number: int = _getcpu()
        return number

else:

    def current_cpu() -> int:
        """-1: it cannot be known here."""
        return -1


def _run_all(works: Sequence[Callable[[], _T]]) -> list[_T]:
    """Runs each on a thread of its own, the first on the caller's.

    Waits for all of them, also if one raises; then raises what the first such raised.
    """
    if len(works) == 1:
        return [works[0]()]
    helpers: list[_Helper] = []
    for _ in works[1:]:
        try:
            helpers.append(_IDLE.pop())
        except IndexError:
            helpers.append(_Helper())
    here = current_cpu()
    for helper, work in zip(helpers, works[1:], strict=True):
        helper.start(work, here)
    try:
        first = works[0]()
    finally:
        ends = [helper.wait() for helper in helpers]
        _IDLE.extend(helpers)
    for _, error in ends:
        if error is not None:
            raise error
    return [first, *(result for result, _ in ends)]


def run_parts(run: Callable[[int, int], _T], parts: Sequence[tuple[int, int]]) -> list[_T]:
    """run(first, end) of every part, each on a thread of its own, the first on the caller's.

    Waits for all of them, also if one raises; then raises what the first such raised.
    """
    return _run_all([lambda a=a, b=b: run(a, b) for a, b in parts])  # type: ignore[misc]


def run_shared(run: Callable[[], object], threads: int) -> None:
    """run() on so many threads, which take from one list of work until it is done: so a helper
    that wakes late only does less. Waits for all of them, see `run_parts`."""
    _run_all([run] * threads)


def split(count: int, threads: int) -> list[tuple[int, int]]:
    """[first, end) of at most `threads` consecutive parts of like size, none of them empty."""
    cuts = [count * i // threads for i in range(threads + 1)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]
