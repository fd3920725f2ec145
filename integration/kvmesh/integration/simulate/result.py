"""What a simulated load comes to. Seconds are simulated, and so is all that is made of them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kvmesh.integration.serve_report import Limits, Spread, spread
from kvmesh.integration.simulate.arrivals import Load
from kvmesh.integration.simulate.mesh import SimMesh
from kvmesh.integration.simulate.record import (
    Emitted,
    Floats,
    QueueTrack,
    RequestRecord,
)
from kvmesh.integration.simulate.scenario import Scenario

_SAMPLES = 200  # of queues over time
_STEADY = (0.2, 0.8)  # of all output tokens: what lies between is the steady state


@dataclass(frozen=True, slots=True)
class Window:
    """Output tokens per second, of all devices and per device, over one stretch of the run."""

    tokens: float
    seconds: float
    tokens_per_s: float
    tokens_per_s_device: float


@dataclass(frozen=True, slots=True)
class PoolResult:
    """One pool of workers. busy: mean share of the run in which its first stages worked.

    slots: sequences that all its workers can run. queue: at even times, over all its workers:
    requests waiting and running, share of KV blocks that sequences hold.
    """

    workers: tuple[str, ...]
    role: str
    device: str
    devices: int
    kv_tokens_per_rank: int
    slots: int
    busy: float
    busy_by_worker: tuple[float, ...]
    peak_kv_share: float
    queue: QueueTrack


@dataclass(frozen=True, slots=True)
class Result:
    """legacy: LoadGen's window: all tokens over the time from the first arrival to the end of the
    request that arrived last. native: over the time to the last end. steady: the tokens between the
    first and the last fifth of them, by the time that they took.

    errors: requests that did not finish, by error. prefix_hits: share of prompt tokens found in
    caches. device_s: devices x seconds from the first arrival to the last end.
    """

    simulated: bool
    events: int
    seconds: float
    requests: int
    finished: int
    too_long: int
    errors: dict[str, int]
    first_error: str
    migrations: int
    input_tokens: int
    output_tokens: int
    prefix_hits: float
    devices: int
    device_s: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    duration: Spread
    legacy: Window
    native: Window
    steady: Window
    pools: tuple[PoolResult, ...]
    records: tuple[RequestRecord, ...] = field(repr=False)

    @property
    def total_tokens_per_s_device(self) -> float:
        """Prompt and output tokens of finished requests, over the native window."""
        return (self.input_tokens + self.output_tokens) / self.device_s if self.device_s else 0.0

    def good(self, limits: Limits) -> int:
        """Finished requests within all limits."""
        return sum(record.finished and within(record, limits) for record in self.records)

    def goodput_per_s(self, limits: Limits) -> float:
        return self.good(limits) / self.seconds if self.seconds else 0.0


def within(record: RequestRecord, limits: Limits) -> bool:
    """Whether a finished request kept all limits."""
    pairs = (
        (record.ttft_s, limits.ttft_s),
        (record.tpot_s, limits.tpot_s),
        (record.longest_gap_s, limits.itl_s),
        (record.duration_s, limits.duration_s),
    )
    return all(limit is None or (value or 0.0) <= limit for value, limit in pairs)


def result_of(scenario: Scenario, load: Load, mesh: SimMesh) -> Result:
    records = sorted(mesh.records, key=lambda record: record.request.index)
    done = [record for record in records if record.finished]
    begin = min((record.arrival_s for record in records), default=0.0)
    last = max((record.end_s or record.arrival_s for record in records), default=0.0)
    seconds = last - begin
    output = sum(record.output_tokens for record in done)
    prompts = sum(record.request.input_tokens for record in done)
    issued = max(records, key=lambda record: (record.arrival_s, record.request.index))
    legacy_s = (issued.end_s or issued.arrival_s) - begin
    cached = sum(record.cached_tokens for record in done)
    failed = [record for record in records if record.error]
    return Result(
        simulated=True,
        events=mesh.clock.events,
        seconds=seconds,
        requests=len(records),
        finished=len(done),
        too_long=load.too_long,
        errors=dict(Counter(record.error.partition(":")[0] for record in failed)),
        first_error=failed[0].error if failed else "",
        migrations=mesh.migrations,
        input_tokens=prompts,
        output_tokens=output,
        prefix_hits=cached / prompts if prompts else 0.0,
        devices=scenario.devices,
        device_s=scenario.devices * seconds,
        ttft=_spread(record.ttft_s for record in done),
        tpot=_spread(record.tpot_s for record in done),
        itl=weighted_spread(*mesh.gaps.weighted()),
        duration=_spread(record.duration_s for record in done),
        legacy=_window(output, legacy_s, scenario.devices),
        native=_window(output, seconds, scenario.devices),
        steady=_steady(mesh.emitted, scenario.devices),
        pools=_pools(scenario, mesh, begin, last),
        records=tuple(records),
    )


def _pools(scenario: Scenario, mesh: SimMesh, begin: float, end: float) -> tuple[PoolResult, ...]:
    times = np.linspace(begin, end, _SAMPLES).tolist()
    seconds = max(end - begin, 1e-12)
    pools = []
    for index, (pool, names) in enumerate(zip(scenario.pools, mesh.fleet.names, strict=True)):
        deployed = mesh.fleet.deployed[index]
        busy = tuple(float(mesh.fleet.busy(name) / seconds) for name in names)
        track = mesh.fleet.queues[index]
        pools.append(
            PoolResult(
                workers=tuple(names),
                role=pool.role,
                device=deployed.device,
                devices=pool.devices,
                kv_tokens_per_rank=deployed.kv_tokens,
                slots=deployed.limits.slots * deployed.ranks * deployed.lanes * pool.workers,
                busy=sum(busy) / len(busy),
                busy_by_worker=busy,
                peak_kv_share=max(track.kv_share, default=0.0),
                queue=track.sampled(times),
            )
        )
    return tuple(pools)


def _spread(values: Iterable[float | None]) -> Spread:
    return spread([value for value in values if value is not None])


def weighted_spread(values: Floats, weights: Floats) -> Spread:
    """Percentiles by the nearest rank of ascending values that each count `weights` times."""
    if not len(values):
        return spread([])
    upto = np.cumsum(weights)

    def at(share: float) -> float:
        return float(values[int(np.searchsorted(upto, share * upto[-1] * (1 - 1e-12)))])

    mean = float((values * weights).sum() / upto[-1])
    return Spread(mean, at(0.5), at(0.9), at(0.95), at(0.99), float(values[-1]))


def _window(tokens: float, seconds: float, devices: int) -> Window:
    rate = tokens / seconds if seconds > 0 else 0.0
    return Window(tokens, seconds, rate, rate / devices)


def _steady(emitted: Emitted, devices: int) -> Window:
    """Between the moments when the first and the last fifth of all output tokens begin and end."""
    if not emitted.tokens:
        return _window(0, 0, devices)
    start, end, tokens = (np.asarray(x) for x in (emitted.start, emitted.end, emitted.tokens))
    edges = np.unique(np.concatenate([start, end]))
    if len(edges) < 2:
        return _window(0, 0, devices)
    # Each span adds its rate from its start to its end: the sum of rates, integrated.
    rate = tokens / np.maximum(end - start, 1e-12)
    change = np.zeros(len(edges))
    np.add.at(change, np.searchsorted(edges, start), rate)
    np.add.at(change, np.searchsorted(edges, end), -rate)
    upto = np.concatenate([[0.0], np.cumsum(np.cumsum(change)[:-1] * np.diff(edges))])
    low, high = (float(np.interp(share * upto[-1], upto, edges)) for share in _STEADY)
    return _window(float(upto[-1]) * (_STEADY[1] - _STEADY[0]), high - low, devices)
