"""Blocks that a worker will hold shortly, because a prompt with them was just sent there. Pure.

So that the siblings of one burst follow the first, before its blocks are reported. `now` is in
seconds.
"""

from collections import deque
from collections.abc import Sequence

MAX_KEYS = 1 << 16  # the oldest expectations are given up first

Life = tuple[str, int]  # member id, incarnation


class Speculation:
    """Expected holders per key, each until a time.

    A holder is one life of a worker, so what was expected of a worker that restarted means nothing
    any more and needs no removal.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._until: dict[bytes, dict[Life, float]] = {}
        self._queue: deque[tuple[float, Life, Sequence[bytes]]] = deque()  # in order of `expect`
        self._size = 0

    def expect(self, holder: Life, keys: Sequence[bytes], now: float, until: float) -> None:
        """`holder` will hold `keys`; if it never says so, this is forgotten at `until`."""
        if not keys:
            return
        for key in keys:
            times = self._until.setdefault(key, {})
            if times.get(holder, now) < until:
                times[holder] = until
        self._queue.append((until, holder, keys))
        self._size += len(keys)
        while self._size > self._max_keys or (self._queue and self._queue[0][0] <= now):
            self._drop_oldest()

    def holders(self, key: bytes, now: float) -> list[Life]:
        """Those that are expected to hold `key`."""
        times = self._until.get(key)
        return [h for h, until in times.items() if until > now] if times else []

    def _drop_oldest(self) -> None:
        until, holder, keys = self._queue.popleft()
        self._size -= len(keys)
        for key in keys:
            times = self._until.get(key)
            # A later expectation of the same may have prolonged it.
            if times is not None and times.get(holder) == until:
                del times[holder]
                if not times:
                    del self._until[key]
