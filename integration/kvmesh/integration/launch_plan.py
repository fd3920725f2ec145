"""Which processes a mesh has, and what becomes of each when it exits. Pure: time is an argument.

A member's life:  WAITING -> STARTING -> READY, and from either -> BACKOFF -> STARTING ...
STOPPING -> STOPPED once a stop was asked for; FAILED if it can never start.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from kvmesh.services.common.config import MeshConfig
from kvmesh.services.common.process import (
    MESH_PORT_VARIABLE,
    METRICS_PORT_VARIABLE,
    PORT_VARIABLE,
)

ROUTER = "router"
TOKENIZER = "tokenizer"
PORT_VARIABLES = (PORT_VARIABLE, MESH_PORT_VARIABLE, METRICS_PORT_VARIABLE)
GATEWAY = "gateway"
TRACES = "traces"
CONFIG_EXIT = 2  # a process that ends with this has a configuration that cannot work


class Phase(StrEnum):
    WAITING = "waiting"  # for the router's address
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"  # it crashed and starts again at `retry_at`
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class MemberPlan:
    """One process. kind: traces, router, tokenizer, kvcache, worker, gateway. role: of workers."""

    member_id: str
    kind: str
    role: str = ""

    @property
    def needed(self) -> bool:
        """Whether the mesh cannot serve without it; it serves without its traces."""
        return self.kind != TRACES


def plan_members(config: MeshConfig) -> tuple[MemberPlan, ...]:
    """All processes: the trace receiver, which hears the rest, then the router, which they join."""
    shards = (MemberPlan(f"kvcache-{i}", "kvcache") for i in range(config.kvcache.shards))
    roles = (table.role for table in config.workers for _ in range(table.count))
    workers = (MemberPlan(f"worker-{i}", "worker", role) for i, role in enumerate(roles))
    traces = (MemberPlan(TRACES, TRACES),) if config.telemetry.traces else ()
    return (
        *traces,
        MemberPlan(ROUTER, ROUTER),
        MemberPlan(TOKENIZER, TOKENIZER),
        *shards,
        *workers,
        *((MemberPlan(GATEWAY, GATEWAY),) if config.gateway.enabled else ()),
    )


def metrics_port(config: MeshConfig, member_id: str) -> int:
    """Where this member shows its metrics: 0, any free port, or counted on from the router's."""
    first = config.telemetry.metrics_port
    if not first:
        return 0
    shown = [plan.member_id for plan in plan_members(config) if plan.kind != TRACES]
    return first + shown.index(member_id)


def stop_order(members: tuple[MemberPlan, ...]) -> tuple[tuple[str, ...], ...]:
    """Member ids in the groups that stop one after another, each when the one before is gone.

    The gateway first, then the router: each takes no new requests and lets the running ones end,
    for which it needs all that come after. The trace receiver last: each process sends its last
    spans when it ends.
    """
    kinds = (GATEWAY, ROUTER, "worker", "kvcache", TOKENIZER, TRACES)
    groups = (tuple(m.member_id for m in members if m.kind == kind) for kind in kinds)
    return tuple(group for group in groups if group)


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Seconds until a crashed process starts again: first_s, doubled by each further crash.

    stable_s: a process that was ready for so long starts again with first_s.
    max_start_crashes: a process that crashes so often in a row without ever having been ready
        has failed.
    """

    first_s: float = 0.2
    max_s: float = 10.0
    stable_s: float = 30.0
    max_start_crashes: int = 3

    def delay_s(self, crashes: int) -> float:
        """Before the next start, after `crashes` >= 1 crashes in a row."""
        return min(self.max_s, self.first_s * 2.0 ** min(crashes - 1, 60))


@dataclass(slots=True)
class MemberProcess:
    """The state machine of one process.

    crashes: in a row, without a stable time in between. restarts: over its whole life.
    addresses, metrics: where it listens and where it shows its metrics; kept over restarts, so
        that it comes back on its old ports.
    """

    plan: MemberPlan
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    phase: Phase = Phase.WAITING
    pid: int | None = None
    addresses: tuple[str, ...] = ()
    metrics: str = ""
    crashes: int = 0
    restarts: int = 0
    ready_at: float | None = None
    retry_at: float | None = None
    exit_code: int | None = None
    was_ready: bool = False

    @property
    def settled(self) -> bool:
        """Ready, or not needed and past its first start."""
        if self.plan.needed:
            return self.phase is Phase.READY
        return self.phase not in (Phase.WAITING, Phase.STARTING)

    def started(self, pid: int) -> None:
        if self.exit_code is not None:
            self.restarts += 1
        self.phase, self.pid = Phase.STARTING, pid
        self.ready_at = self.retry_at = None

    def bound(self, addresses: tuple[str, ...]) -> None:
        """It listens; it may still wait for others before it is ready."""
        self.addresses = addresses

    def became_ready(self, addresses: tuple[str, ...], now: float) -> None:
        self.addresses = addresses
        self.was_ready = True
        if self.phase is Phase.STARTING:
            self.phase, self.ready_at = Phase.READY, now

    def stopping(self) -> None:
        """A stop was asked for: its exit is no crash."""
        self.phase = Phase.STOPPED if self.pid is None else Phase.STOPPING

    def exited(self, exit_code: int, now: float) -> None:
        """exit_code: negative is the number of the signal that killed it."""
        self.pid, self.exit_code = None, exit_code
        if self.phase is Phase.STOPPING:
            self.phase = Phase.STOPPED
            return
        stable = self.ready_at is not None and now - self.ready_at >= self.policy.stable_s
        self.crashes = 1 if stable else self.crashes + 1
        never = not self.was_ready
        if never and (exit_code == CONFIG_EXIT or self.crashes >= self.policy.max_start_crashes):
            self.phase = Phase.FAILED
        else:
            self.phase, self.retry_at = Phase.BACKOFF, now + self.policy.delay_s(self.crashes)
        self.ready_at = None


def describe_exit(exit_code: int) -> str:
    """In words, for messages."""
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with {exit_code}"


def port_environment(addresses: tuple[str, ...], metrics: str = "") -> dict[str, str]:
    """Variables that bring a process back on the ports it had; empty for its first start."""
    ports = (address.rpartition(":")[2] for address in addresses)
    variables = dict[str, str](zip((PORT_VARIABLE, MESH_PORT_VARIABLE), ports, strict=False))
    if metrics:
        variables[METRICS_PORT_VARIABLE] = metrics.rpartition(":")[2]
    return variables
