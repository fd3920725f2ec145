"""Blocks that a worker will hold shortly, because a prompt with them was just sent there. Pure.

So that the siblings of one burst follow the first, before its blocks are reported. `now` is in
seconds.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MAX_KEYS = 1 << 16  # the oldest expectations are given up first

Life = tuple[str, int]  # member id, incarnation


@dataclass(frozen=True, slots=True, eq=False)
class _Expected:
    holder: Life
    until: float


class Speculation:
    """Expected holders per key, each until a time.

    A holder is one life of a worker, so what was expected of a worker that restarted means nothing
    any more and needs no removal.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._by_key: dict[bytes, tuple[_Expected, ...]] = {}  # one per holder
        # In order of `expect`: what the keys have that nobody else was expected for, and the keys.
        self._queue: deque[tuple[tuple[_Expected, ...], Sequence[bytes]]] = deque()
        self._size = 0

    def expect(self, holder: Life, keys: Sequence[bytes], now: float, until: float) -> None:
        """`holder` will hold `keys`; if it never says so, this is forgotten at `until`."""
        if not keys:
            return
        expected = _Expected(holder, until)
        alone: tuple[_Expected, ...] = (expected,)
        # All keys at once; most prompts are long, and few of their blocks are expected already.
        added: dict[bytes, tuple[_Expected, ...]] = dict.fromkeys(keys, alone)
        for key in self._by_key.keys() & added.keys():
            added[key] = _joined(self._by_key[key], expected, now)
        self._by_key.update(added)
        self._queue.append((alone, keys))
        self._size += len(keys)
        while self._size > self._max_keys or (self._queue and self._queue[0][0][0].until <= now):
            self._drop_oldest()

    def holders(self, key: bytes, now: float) -> list[Life]:
        """Those that are expected to hold `key`."""
        return [e.holder for e in self._by_key.get(key, ()) if e.until > now]

    def _drop_oldest(self) -> None:
        alone, keys = self._queue.popleft()
        self._size -= len(keys)
        by_key = self._by_key
        for key in keys:
            known = by_key.get(key, ())
            if known is alone:
                del by_key[key]
            elif alone[0] in known:
                by_key[key] = tuple(e for e in known if e is not alone[0])


def _joined(known: tuple[_Expected, ...], expected: _Expected, now: float) -> tuple[_Expected, ...]:
    """`known` that are not over, with `expected` unless its holder is expected for longer."""
    alive = tuple(e for e in known if e.until > now)
    if any(e.holder == expected.holder and e.until >= expected.until for e in alive):
        return alive
    return *(e for e in alive if e.holder != expected.holder), expected
