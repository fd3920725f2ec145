"""Whether the mesh takes one more request. Pure; `now` is in seconds.

A request that is refused is told when to come back: after the time in which, at the present rate,
a place becomes free.
"""

from kvmesh.services.common.errors import Overloaded

MIN_RETRY_S = 0.05
MAX_RETRY_S = 60.0
FIRST_DURATION_S = 1.0  # of a request, as long as none has ended
_SMOOTHING = 0.1


class Durations:
    """How long a request takes, smoothed over those that finished."""

    def __init__(self) -> None:
        self.mean_s = FIRST_DURATION_S

    def add(self, seconds: float) -> None:
        self.mean_s += _SMOOTHING * (seconds - self.mean_s)


class Admission:
    """Counts the requests in the mesh against `max_active`, and their wait against a limit."""

    def __init__(self, max_active: int, max_waiting_s: float) -> None:
        self._max_active = max_active
        self._max_waiting_s = max_waiting_s
        self._durations = Durations()
        self._started: dict[str, float] = {}
        self.total = 0
        self.rejected = 0

    @property
    def active(self) -> int:
        return len(self._started)

    def enter(self, request_id: str, now: float) -> None:
        """Takes a place; leave() gives it back. Raises Overloaded if there is none."""
        self.total += 1
        if len(self._started) >= self._max_active:
            self.rejected += 1
            raise Overloaded(
                f"{len(self._started)} requests are active, at most {self._max_active}",
                bounded_retry(self._durations.mean_s / self._max_active),
            )
        self._started[request_id] = now

    def check_wait(self, wait_s: float) -> None:
        """Raises Overloaded if the predicted wait is over the limit."""
        if wait_s > self._max_waiting_s:
            self.rejected += 1
            raise Overloaded(
                f"predicted wait is {wait_s:.1f} s, at most {self._max_waiting_s:g} s",
                bounded_retry(wait_s - self._max_waiting_s),
            )

    def leave(self, request_id: str, now: float, finished: bool) -> None:
        """Gives the place back; only requests that finished tell how long one takes."""
        began = self._started.pop(request_id, None)
        if began is not None and finished:
            self._durations.add(now - began)


def bounded_retry(seconds: float) -> float:
    """A delay that a client can be told: not at once, and not for ever."""
    return min(MAX_RETRY_S, max(MIN_RETRY_S, seconds))
