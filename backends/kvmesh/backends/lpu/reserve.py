"""Reservation tables: who holds which port and which stream slot when."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from kvmesh.backends.lpu.program import ScheduleError


class Claim(NamedTuple):
    """A resource held for cycles [begin, end), counted from where the claims are placed.

    A stream slot moves with its data, so its cycles are those at which it passes position 0 (may
    be negative).
    """

    resource: str
    begin: int
    end: int


class _Table:
    """Disjoint intervals in order."""

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.ends: list[int] = []

    def clash(self, begin: int, end: int) -> int | None:
        """End of the last interval that overlaps [begin, end), or None."""
        at = bisect_left(self.begins, end) - 1
        return self.ends[at] if at >= 0 and self.ends[at] > begin else None

    def take(self, begin: int, end: int) -> None:
        at = bisect_right(self.begins, begin)
        self.begins.insert(at, begin)
        self.ends.insert(at, end)


class Reservations:
    """All resources of a chip."""

    def __init__(self) -> None:
        self._tables: dict[str, _Table] = {}

    def place(self, claims: Sequence[Claim], ready: int) -> int:
        """Takes the claims at the first cycle >= ready at which all are free; returns it.

        Raises ScheduleError if the claims clash with one another.
        """
        _check_apart(claims)
        tables = [self._tables.setdefault(claim.resource, _Table()) for claim in claims]
        at, moved = ready, True
        while moved:
            moved = False
            for claim, table in zip(claims, tables, strict=True):
                free = table.clash(at + claim.begin, at + claim.end)
                if free is not None:
                    at, moved = free - claim.begin, True
        for claim, table in zip(claims, tables, strict=True):
            table.take(at + claim.begin, at + claim.end)
        return at


def _check_apart(claims: Sequence[Claim]) -> None:
    ordered = sorted(claims)
    for one, other in pairwise(ordered):
        if one.resource == other.resource and other.begin < one.end:
            raise ScheduleError(
                f"{one.resource} is needed twice at once, in cycles [{other.begin}, {one.end})"
            )
