"""What became of a load: latencies, throughput, goodput and cost. Pure."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.integration.loadgen import RequestResult
from kvmesh.services.common.percentile import percentile


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a request may take to count as good; None: any.

    itl_s: of the longest gap between two of its tokens.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds; None of them if nothing was measured."""

    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """A load as the client saw it. Rates are by seconds from the first arrival to the last end.

    ttft, duration: from when a request was due. tpot: of each request, between its first and last
    token, per token. itl: gaps between responses that brought tokens, over all requests.
    late: how far behind its time the client sent. goodput: requests within all limits, per second.
    device_s, cost_usd: as the mesh reported them; None if it did not, or for both kinds of clocks.
    cost_kind: measured, simulated, mixed; empty if not reported. simulated_ttft, simulated_tpot: by
    the clocks of simulated devices, where all else is what the client measured.
    """

    seconds: float
    requests: int
    finished: int
    errors: dict[str, int]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    good: int
    goodput_per_s: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    duration: Spread
    late: Spread
    migrations: int
    device_s: float | None
    cost_usd: float | None
    usd_per_million_tokens: float | None
    cost_kind: str
    simulated_ttft: Spread
    simulated_tpot: Spread


def report(results: Sequence[RequestResult], limits: Limits) -> Report:
    """Raises ValueError for no results."""
    if not results:
        raise ValueError("no request was sent, so there is nothing to report")
    done = [result for result in results if not result.error]
    begin = min(result.begin_s for result in results)
    seconds = max(result.begin_s + result.duration_s for result in results) - begin
    output = sum(result.usage.completion_tokens for result in done)
    given = sum(result.usage.prompt_tokens for result in done)
    good = sum(within(result, limits) for result in done)
    kinds = {result.usage.cost_kind for result in done} - {""}
    kind = kinds.pop() if len(kinds) == 1 else "mixed" if kinds else ""
    mixed = kind == "mixed"
    cost = None if mixed else _reported(done, "cost_usd")
    simulated = [result for result in done if result.usage.cost_kind == "simulated"]
    return Report(
        seconds=seconds,
        requests=len(results),
        finished=len(done),
        errors=dict(Counter(r.error.partition(":")[0] for r in results if r.error)),
        input_tokens=given,
        cached_tokens=sum(result.usage.cached_tokens for result in done),
        output_tokens=output,
        output_tokens_per_s=_rate(output, seconds),
        total_tokens_per_s=_rate(given + output, seconds),
        requests_per_s=_rate(len(done), seconds),
        good=good,
        goodput_per_s=_rate(good, seconds),
        ttft=spread([result.ttft_s for result in done]),
        tpot=spread([tpot for result in done if (tpot := tpot_s(result)) is not None]),
        itl=spread([gap for result in done for gap in gaps_s(result)]),
        duration=spread([result.duration_s for result in done]),
        late=spread([result.late_s for result in results]),
        migrations=sum(result.usage.migrations for result in done),
        device_s=None if mixed else _reported(done, "device_s"),
        cost_usd=cost,
        usd_per_million_tokens=cost / output * 1e6 if cost is not None and output else None,
        cost_kind=kind,
        simulated_ttft=spread([result.usage.simulated_ttft_s for result in simulated]),
        simulated_tpot=spread(
            [tpot for result in simulated if (tpot := _simulated_tpot_s(result)) is not None]
        ),
    )


def within(result: RequestResult, limits: Limits) -> bool:
    """Whether a finished request kept all limits."""
    longest = max(gaps_s(result), default=0.0)
    pairs = (
        (result.ttft_s, limits.ttft_s),
        (tpot_s(result) or 0.0, limits.tpot_s),
        (longest, limits.itl_s),
        (result.duration_s, limits.duration_s),
    )
    return all(limit is None or value <= limit for value, limit in pairs)


def tpot_s(result: RequestResult) -> float | None:
    """Seconds per output token after the first; None for an output of one."""
    count = result.usage.completion_tokens
    if count < 2 or not result.token_s:
        return None
    return (result.token_s[-1][0] - result.token_s[0][0]) / (count - 1)


def _simulated_tpot_s(result: RequestResult) -> float | None:
    usage = result.usage
    if usage.completion_tokens < 2:
        return None
    return (usage.simulated_duration_s - usage.simulated_ttft_s) / (usage.completion_tokens - 1)


def gaps_s(result: RequestResult) -> list[float]:
    """Seconds between each two responses with tokens."""
    times = [at for at, _ in result.token_s]
    return [after - before for before, after in itertools.pairwise(times)]


def spread(values: Sequence[float]) -> Spread:
    """Percentiles by the nearest rank."""
    if not values:
        return Spread(None, None, None, None, None, None)
    ordered = sorted(values)

    def at(share: float) -> float:
        return percentile(ordered, share)

    mean = sum(ordered) / len(ordered)
    return Spread(mean, at(0.5), at(0.9), at(0.95), at(0.99), ordered[-1])


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _reported(results: Sequence[RequestResult], field: str) -> float | None:
    """The sum of a usage field; None as long as no request of the mesh reports one."""
    total = sum(getattr(result.usage, field) for result in results)
    return total or None
