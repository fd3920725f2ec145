"""Unfinished blocks kept after a hand-over, until fetched, dropped or expired. Pure."""

from collections import OrderedDict

from kvmesh.services.worker.sequence import Tail

KEEP_S = 30.0
MAX_TAILS = 256


class KeptTails:
    """Tails by request id. The oldest go when there are too many."""

    def __init__(self, max_tails: int = MAX_TAILS, keep_s: float = KEEP_S) -> None:
        self._max_tails = max_tails
        self._keep_s = keep_s
        self._tails: OrderedDict[str, tuple[float, Tail]] = OrderedDict()  # by rising expiry

    def __len__(self) -> int:
        return len(self._tails)

    def keep(self, request_id: str, tail: Tail, now: float) -> None:
        self.expire(now)
        self._tails.pop(request_id, None)
        while len(self._tails) >= self._max_tails:
            self._tails.popitem(last=False)
        self._tails[request_id] = (now + self._keep_s, tail)

    def take(self, request_id: str, now: float) -> Tail | None:
        """The tail, which is then no longer kept; None if it is not there (any more)."""
        self.expire(now)
        entry = self._tails.pop(request_id, None)
        return entry[1] if entry is not None else None

    def drop(self, request_id: str) -> None:
        """An unknown one is no error."""
        self._tails.pop(request_id, None)

    def expire(self, now: float) -> None:
        while self._tails:
            expiry, _ = next(iter(self._tails.values()))
            if expiry > now:
                return
            self._tails.popitem(last=False)
