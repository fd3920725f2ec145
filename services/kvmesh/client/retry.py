"""Whether a failed call is tried again, and when. Pure: time and chance are arguments."""

from dataclasses import dataclass

from kvmesh.services.common.errors import MeshError, Overloaded, Unavailable

TIMEOUT_S = 600.0  # of a call that names no other; the router's own default limit

_RETRIED = (Unavailable, Overloaded)


@dataclass(frozen=True, slots=True)
class Retry:
    """At most `attempts` tries; pauses of first_s, doubled each time up to max_s, half jitter.

    Only UNAVAILABLE and RESOURCE_EXHAUSTED are tried again: the others would end the same way.
    """

    attempts: int = 5
    first_s: float = 0.1
    max_s: float = 10.0

    def pause_s(self, attempt: int, error: MeshError, chance: float) -> float | None:
        """Seconds between try `attempt` (from 1), which ended with `error`, and the next one.

        None: no next one. Never less than the server asked for. chance: in [0, 1).
        """
        if attempt >= self.attempts or not isinstance(error, _RETRIED):
            return None
        backoff = min(self.max_s, self.first_s * 2.0 ** (attempt - 1))
        return max(error.retry_after_s, backoff * (0.5 + 0.5 * chance))


NO_RETRY = Retry(attempts=1)


class Attempts:
    """The tries of one call, which together end before its deadline."""

    def __init__(self, retry: Retry, timeout_s: float, now: float) -> None:
        self._retry = retry
        self._deadline = now + timeout_s
        self._count = 1

    def left_s(self, now: float) -> float:
        """For the next try; at least a millisecond, since gRPC takes no less for a deadline."""
        return max(0.001, self._deadline - now)

    def pause_s(self, error: MeshError, now: float, chance: float) -> float:
        """Seconds until the next try. Raises `error` if there is none, or no time for one."""
        pause = self._retry.pause_s(self._count, error, chance)
        if pause is None or now + pause >= self._deadline:
            raise error
        self._count += 1
        return pause
