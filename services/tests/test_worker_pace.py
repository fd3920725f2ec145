"""What a worker learns of its rounds: all of their time, but none in which there was no work."""

from array import array

import pytest

from kvmesh.backends.base import Estimate
from kvmesh.services.common.sampling import SamplingSettings
from kvmesh.services.kvcache.keys import KEY_BYTES
from kvmesh.services.worker.limits import Planned
from kvmesh.services.worker.pace import Pace
from kvmesh.services.worker.sequence import Sequence, Work

PRIOR = Estimate(1e-3, 1e-4, 1e-4, 1e-8)


def planned(start: int, count: int) -> Planned:
    tokens = array("q", bytes(8 * (start + count)))
    settings = SamplingSettings(max_tokens=8)
    work = Work(1, "r", tokens, len(tokens), settings, bytes(KEY_BYTES))
    return Planned(Sequence(1, work, len(tokens) + 8, 0.0), start, count, True)


def test_rounds_are_timed_from_end_to_end_or_from_when_work_came() -> None:
    pace, now = Pace(PRIOR, 0.0), 0.0
    for _ in range(100):
        now += 5.0  # nothing to do
        pace.woke(now)
        for tokens in (200, 100, 50):
            now += 0.003 + 0.0002 * tokens
            pace.stepped([planned(0, tokens)], now)
        for batch in (1, 2, 4):
            now += 0.003 + 0.0005 * batch
            pace.stepped([planned(100, 1)] * batch, now)
    found = pace.estimate()
    assert found.base_s == pytest.approx(0.003, rel=0.1)
    assert found.prefill_token_s == pytest.approx(0.0002, rel=0.1)
    assert found.decode_token_s == pytest.approx(0.0005, rel=0.1)
    assert not found.simulated


def test_before_any_round_the_device_s_own_estimate_holds() -> None:
    assert Pace(PRIOR, 0.0).estimate() == PRIOR
