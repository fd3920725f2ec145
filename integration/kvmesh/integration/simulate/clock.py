"""Virtual time: what happens next. Events of one moment happen in the order they were set."""

import heapq
from collections.abc import Callable


class Alarm:
    """One event to come; cancelled, it does not happen."""

    __slots__ = ("action", "at")

    def __init__(self, at: float, action: Callable[[], None]) -> None:
        self.at = at
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self.action = None


class VirtualClock:
    """now: simulated seconds from the start of the load; it only moves forward."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Alarm]] = []
        self._set = 0

    def at(self, when: float, action: Callable[[], None]) -> Alarm:
        """Calls `action` at `when`, or now if that is over."""
        alarm = Alarm(max(when, self.now), action)
        self._set += 1
        heapq.heappush(self._heap, (alarm.at, self._set, alarm))
        return alarm

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap = self._heap
        while heap:
            when, _, alarm = heapq.heappop(heap)
            if alarm.action is not None:
                self.now = when
                self.events += 1
                alarm.action()
