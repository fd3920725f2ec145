"""What each tenant may take of the mesh: requests and tokens per minute, requests at once. Pure.

Times are seconds of any clock that does not go back. Token buckets: a bucket of a minute's amount
that fills at the limit's rate, so in any t seconds no more than limit * (1 + t / 60) is taken; of
tokens, and once more the part of a single request that is over a whole minute's amount.

Tokens are known when a request ends, and are held against the limit before: of its prompt and of
the longest output that it may have. What it did not use goes back.
"""

from collections import Counter
from dataclasses import dataclass, field

from kvmesh.services.common.api_keys import Limits, Tenant
from kvmesh.services.common.errors import Overloaded
from kvmesh.services.router.admission import Durations, bounded_retry

MINUTE_S = 60.0


class Bucket:
    """`per_minute` units, full at first. The level may go below zero by `settle` alone."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def resize(self, per_minute: int, now: float) -> None:
        """Another limit from now on; what was taken stays taken."""
        if per_minute != self.per_minute:
            taken = self.per_minute - self.level(now)
            self.per_minute = per_minute
            self._level = per_minute - taken

    def level(self, now: float) -> float:
        if now > self._at:
            gained = (now - self._at) * self.per_minute / MINUTE_S
            self._level = min(float(self.per_minute), self._level + gained)
            self._at = now
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Until `amount` can be taken, if nobody else takes any; 0 if now."""
        return max(0.0, amount - self.level(now)) * MINUTE_S / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """The caller has seen that wait_s is 0."""
        self._level = self.level(now) - amount

    def settle(self, held: float, used: float, now: float) -> None:
        """Of what was taken, `used` were needed."""
        self._level = min(float(self.per_minute), self.level(now) + held - used)


@dataclass(slots=True)
class _Running:
    began: float
    held: int = 0  # tokens taken of the bucket


@dataclass(slots=True)
class TenantState:
    """One tenant's. refused: by the limit's name."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: dict[str, _Running] = field(default_factory=dict)
    durations: Durations = field(default_factory=Durations)
    num_requests: int = 0
    num_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class TenantLimits:
    """Counts what tenants take. A refusal is Overloaded, and says when to come again."""

    def __init__(self) -> None:
        self._states: dict[str, TenantState] = {}

    @property
    def states(self) -> dict[str, TenantState]:
        """By the tenant's name; for metrics."""
        return self._states

    def enter(self, tenant: Tenant, ticket: str, now: float) -> None:
        """Takes a place for one request; leave() gives it back. Takes nothing if it raises."""
        state = self._state(tenant, now)
        limit = tenant.limits.concurrency
        if limit is not None and len(state.running) >= limit:
            wait_s = state.durations.mean_s / limit
            raise _refusal(state, tenant, "concurrency", f"{limit} requests at once", wait_s)
        if state.tokens is not None and state.tokens.level(now) <= 0:
            raise _over_tokens(state, tenant, state.tokens.wait_s(1, now))
        if state.requests is not None:
            wait_s = state.requests.wait_s(1, now)
            if wait_s > 0:
                what = f"{state.requests.per_minute} requests per minute"
                raise _refusal(state, tenant, "requests", what, wait_s)
            state.requests.take(1, now)
        state.running[ticket] = _Running(now)
        state.num_requests += 1

    def hold(self, tenant: Tenant, ticket: str, num_tokens: int, now: float) -> None:
        """Takes the tokens that a request may need. Raises Overloaded if they are not there.

        More than a minute's amount is taken when the bucket is full; the rest of it is owed.
        """
        state = self._state(tenant, now)
        bucket = state.tokens
        if bucket is None:
            return
        held = min(num_tokens, bucket.per_minute)
        wait_s = bucket.wait_s(held, now)
        if wait_s > 0:
            raise _over_tokens(state, tenant, wait_s)
        bucket.take(held, now)
        state.running[ticket].held = held

    def leave(
        self, tenant: Tenant, ticket: str, num_tokens: int, now: float, finished: bool
    ) -> None:
        """The request is over and used so many tokens. One that never entered is no error."""
        state = self._state(tenant, now)
        running = state.running.pop(ticket, None)
        if running is None:
            return
        state.num_tokens += num_tokens
        if state.tokens is not None:
            state.tokens.settle(running.held, num_tokens, now)
        if finished:
            state.durations.add(now - running.began)

    def _state(self, tenant: Tenant, now: float) -> TenantState:
        state = self._states.setdefault(tenant.name, TenantState())
        limits: Limits = tenant.limits
        state.requests = _fitted(state.requests, limits.requests_per_minute, now)
        state.tokens = _fitted(state.tokens, limits.tokens_per_minute, now)
        return state


def _fitted(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    """The bucket as the key file has it now."""
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.resize(per_minute, now)
    return bucket


def _over_tokens(state: TenantState, tenant: Tenant, wait_s: float) -> Overloaded:
    what = f"{tenant.limits.tokens_per_minute} tokens per minute"
    return _refusal(state, tenant, "tokens", what, wait_s)


def _refusal(
    state: TenantState, tenant: Tenant, limit: str, what: str, wait_s: float
) -> Overloaded:
    state.refused[limit] += 1
    return Overloaded(f"tenant {tenant.name} may have {what}", bounded_retry(wait_s))
