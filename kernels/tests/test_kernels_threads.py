"""Parts of a kernel's work on threads."""

import os
import sys
import threading

import pytest

from kvmesh.kernels.cpu.threads import run_parts, split


def test_parts_are_run_once_each_and_in_order():
    assert run_parts(lambda first, end: (first, end), split(10, 3)) == [(0, 3), (3, 6), (6, 10)]
    assert run_parts(lambda first, end: end, split(1, 4)) == [1]


def test_all_parts_end_before_an_error_is_raised():
    ended = threading.Event()

    def run(first: int, end: int) -> None:
        if first == 0:
            raise ValueError("the first part")
        ended.set()

    with pytest.raises(ValueError, match="the first part"):
        run_parts(run, [(0, 1), (1, 2)])
    assert ended.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="no affinity of threads")
def test_helpers_stay_off_the_callers_cpu():
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU")
    seen = []

    def call() -> None:
        run_parts(lambda first, end: None, [(0, 1), (1, 2)])  # starts the helper
        for cpu in cpus[:2]:
            os.sched_setaffinity(0, {cpu})
            seen.append(run_parts(lambda first, end: os.sched_getaffinity(0), [(0, 1), (1, 2)]))

    caller = threading.Thread(target=call)
    caller.start()
    caller.join()
    assert [helper for _, helper in seen] == [set(cpus) - {cpu} for cpu in cpus[:2]]
