"""What is simulated: model, devices, how they are laid out, and what is switched on. Pure data."""

import math
from dataclasses import dataclass, field
from typing import Literal

from kvmesh.backends.architectures import ModelShape
from kvmesh.backends.base import Estimate
from kvmesh.backends.cost.parallel import Formats, Parallel
from kvmesh.backends.devices.device import Device
from kvmesh.services.common.errors import ConfigError

Role = Literal["both", "prefill", "decode"]
ROLES: tuple[Role, ...] = ("both", "prefill", "decode")
POLICIES = ("kv-aware", "least-loaded", "round-robin", "random")
LINKS = ("scale-up", "scale-out")
MAX_WORKERS = 4096


class ScenarioError(ConfigError):
    """A scenario that cannot be simulated; the message names the field, its value and its limit."""


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ScenarioError(f"{name} is {value}, must be in {low}..{high}")


@dataclass(frozen=True, slots=True)
class Optimisations:
    """What can be switched on and off by itself; every one acts on times or decisions, none is a
    factor.

    kv: format of the KV cache (a codec by name, or fp8). fused: small kernels joined. balance: of
    attention data parallel, requests go to the rank with least to do, and prompts wait a few steps
    so that ranks compute theirs together; without, ranks take turns. expert_balance: experts are
    placed by load, so that tokens spread evenly; without, the busiest rank follows a power law.
    acceptance: of multi-token prediction, the chance that the draft at each position is accepted if
    those before it were; empty: no drafts. policy: how the router chooses.

    Disaggregation and wide expert parallelism are ways to lay workers out: see WorkerPool.
    """

    kv: str = "fp16"
    fused: bool = True
    balance: bool = True
    expert_balance: bool = True
    acceptance: tuple[float, ...] = ()
    policy: str = "kv-aware"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ScenarioError(f"policy is {self.policy!r}, must be one of {', '.join(POLICIES)}")
        for position, chance in enumerate(self.acceptance, 1):
            if not 0 <= chance <= 1:
                raise ScenarioError(
                    f"acceptance of draft {position} is {chance:g}, must be in [0, 1]"
                )


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """Workers that are alike. One worker is one instance of the model on parallel.devices devices.

    slots: sequences that run at once on each attention rank. step_tokens: most tokens of a rank's
    step. prefill_chunk: most prompt tokens of a step in which others decode; None: step_tokens.
    device: if it is another than the scenario's.
    """

    workers: int = 1
    parallel: Parallel = field(default_factory=Parallel)
    role: Role = "both"
    slots: int = 256
    step_tokens: int = 8192
    prefill_chunk: int | None = None
    device: Device | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ScenarioError(f"role is {self.role!r}, must be one of {', '.join(ROLES)}")
        _within("workers", self.workers, 1, MAX_WORKERS)
        _within("slots", self.slots, 1, 1 << 16)
        _within("step_tokens", self.step_tokens, 1, 1 << 20)
        if self.prefill_chunk is not None:
            _within("prefill_chunk", self.prefill_chunk, 1, self.step_tokens)

    @property
    def devices(self) -> int:
        return self.workers * self.parallel.devices


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker dies at `at_s` with all it holds; back_s: seconds until it is there again, empty."""

    worker: str
    at_s: float
    back_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.at_s < math.inf:
            raise ScenarioError(f"fail: {self.worker} at {self.at_s:g} s, must be at 0 or later")
        if self.back_s is not None and not 0 <= self.back_s < math.inf:
            raise ScenarioError(f"fail: {self.worker} back after {self.back_s:g} s, must be >= 0")


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds that services and RPCs take beside the devices. request_s: from the client to the
    worker's queue. token_s: from a step's end to the client; first_token_s: of a request's first
    token, if that takes another time."""

    request_s: float = 0.0
    token_s: float = 0.0
    first_token_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("request_s", "token_s", "first_token_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ScenarioError(f"overheads.{name} is {value:g}, must be at least 0")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A mesh to simulate.

    device: None where estimate, kv_blocks and, for a hand-over, transfer_bytes_s stand in for it.
    weights, attention_weights: formats of the weights. link: what prompts' K and V are handed over
    by, or None for scale-up if all devices stand in one domain. transfer_bytes_s: in its place, of
    each device. estimate: steps are timed by it instead of the cost model (a measured one).
    kv_blocks: blocks of each rank, in place of what its memory holds. handover_min_tokens: uncached
    prompt tokens below which a decode worker computes the prompt itself.
    """

    model: ModelShape
    device: Device | None
    pools: tuple[WorkerPool, ...] = (WorkerPool(),)
    options: Optimisations = field(default_factory=Optimisations)
    weights: str = "bf16"
    attention_weights: str | None = None
    link: str | None = None
    transfer_bytes_s: float | None = None
    handover_min_tokens: int = 256
    max_active: int | None = None
    failures: tuple[Failure, ...] = ()
    overheads: Overheads = field(default_factory=Overheads)
    estimate: Estimate | None = None
    kv_blocks: int | None = None

    def __post_init__(self) -> None:
        if not self.pools:
            raise ScenarioError("pools is empty, must have at least one pool of workers")
        roles = {pool.role for pool in self.pools}
        if roles == {"prefill"}:
            raise ScenarioError("every pool has role prefill; add one with role decode or both")
        if self.device is None and (self.estimate is None or self.kv_blocks is None):
            raise ScenarioError("device is missing; give one, or both estimate and kv_blocks")
        if self.device is None and "prefill" in roles and self.transfer_bytes_s is None:
            raise ScenarioError("device is missing, which a hand-over needs; give transfer_bytes_s")
        if self.link is not None and self.link not in LINKS:
            raise ScenarioError(f"link is {self.link!r}, must be one of {', '.join(LINKS)}")
        if self.transfer_bytes_s is not None and not 0 < self.transfer_bytes_s < math.inf:
            raise ScenarioError(
                f"transfer_bytes_s is {self.transfer_bytes_s:g}, must be greater than 0"
            )
        _within("handover_min_tokens", self.handover_min_tokens, 0, 1 << 30)
        if self.max_active is not None:
            _within("max_active", self.max_active, 1, 1 << 30)
        if self.kv_blocks is not None:
            _within("kv_blocks", self.kv_blocks, 1, 1 << 30)
        _within("workers of all pools", sum(pool.workers for pool in self.pools), 1, MAX_WORKERS)
        if self.options.acceptance and not self.model.mtp_layers:
            raise ScenarioError(
                f"acceptance has {len(self.options.acceptance)} drafts, must have 0: "
                f"{self.model.name} has no layer of multi-token prediction"
            )

    @property
    def devices(self) -> int:
        """All of them, whatever their part."""
        return sum(pool.devices for pool in self.pools)

    def formats(self) -> Formats:
        return Formats(self.weights, self.options.kv, self.attention_weights)

    def device_of(self, pool: WorkerPool) -> Device:
        """Raises ScenarioError if there is none."""
        found = pool.device or self.device
        if found is None:
            raise ScenarioError("device is missing, which the cost of a step needs; give one")
        return found

    def device_name(self, pool: WorkerPool) -> str:
        found = pool.device or self.device
        return "measured" if found is None else found.name
