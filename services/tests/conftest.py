"""Leaves out the tests that compare with torch where it is not installed (make says so)."""

import importlib.util

NEED_TORCH = ["test_worker_real.py", "test_worker_sampler.py"]

collect_ignore = [] if importlib.util.find_spec("torch") else NEED_TORCH
