"""Which of gRPC's two pollers a process uses.

From 1.80 on gRPC's Python reads sockets in a pool of threads (its "event engine") that wakes the
asyncio loop through yet another one. A token is a small message: waking threads is most of what it
costs. The poller of before, which 1.81 still has, takes about half the CPU per message. A version
that no longer knows these names ignores them.
"""

import os

VARIABLE = "GRPC_EXPERIMENTS"
DIRECT = "-event_engine_client,-event_engine_listener"


def choose_poller() -> None:
    """Before gRPC is first used in a process. What the environment says already stays."""
    os.environ.setdefault(VARIABLE, DIRECT)
