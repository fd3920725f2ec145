"""Device seconds and dollars of a request over the workers that it was on."""

import pytest

from kvmesh.services.router.bill import Bill
from kvmesh.v1 import inference_pb2, mesh_pb2, worker_pb2


def member(name: str, price: float, devices: int = 1, simulated: bool = False) -> mesh_pb2.Member:
    return mesh_pb2.Member(
        member_id=name, device=f"{name}'s", devices=devices, price_usd_h=price, simulated=simulated
    )


def usage_of(*stays: tuple[mesh_pb2.Member, worker_pb2.DeviceSeconds]) -> inference_pb2.Usage:
    bill, usage = Bill(), inference_pb2.Usage()
    for where, seconds in stays:
        bill.arrive(where)
        half = worker_pb2.DeviceSeconds(queue_s=seconds.queue_s / 2)
        bill.note(half)
        bill.note(seconds)  # sums so far: the last one counts
        bill.fill(usage)
    return usage


def test_a_hand_over_adds_up_at_each_workers_own_price():
    usage = usage_of(
        (member("p", 3.6, devices=2), worker_pb2.DeviceSeconds(queue_s=1, prefill_s=2, kv_s=1)),
        (member("d", 7.2), worker_pb2.DeviceSeconds(decode_s=3)),
    )
    assert usage.device_s == pytest.approx(2 * 4 + 3)
    assert usage.cost_kind == "measured"
    split = usage.cost_split
    parts = [split.queue_usd, split.prefill_usd, split.decode_usd, split.kv_usd]
    assert parts == pytest.approx([0.002, 0.004, 0.006, 0.002])
    assert usage.cost_usd == pytest.approx(sum(parts))
    assert [stay.worker for stay in usage.devices] == ["p", "d"]


def test_a_migration_keeps_what_the_dead_worker_took():
    seconds = worker_pb2.DeviceSeconds(prefill_s=1, decode_s=1)
    usage = usage_of((member("a", 3.6), seconds), (member("b", 3.6), seconds))
    assert usage.device_s == pytest.approx(4)
    assert usage.cost_usd == pytest.approx(0.004)


def test_simulated_and_measured_are_never_added():
    seconds = worker_pb2.DeviceSeconds(prefill_s=1, simulated_s=5)
    usage = usage_of((member("a", 1.0), seconds), (member("b", 1.0, simulated=True), seconds))
    assert usage.cost_kind == "mixed"
    assert (usage.device_s, usage.cost_usd, usage.HasField("cost_split")) == (0.0, 0.0, False)
    assert len(usage.devices) == 2


def test_no_price_is_no_cost_but_seconds_are_known():
    usage = usage_of((member("a", 0.0), worker_pb2.DeviceSeconds(decode_s=2)))
    assert usage.device_s == 2.0
    assert not usage.HasField("cost_split")


def test_simulated_time_goes_on_from_worker_to_worker():
    usage = usage_of(
        (member("a", 1, simulated=True), worker_pb2.DeviceSeconds(simulated_s=0.25)),
        (member("b", 1, simulated=True), worker_pb2.DeviceSeconds(simulated_s=0.5)),
    )
    assert usage.simulated_duration_s == pytest.approx(0.75)
    assert usage.cost_kind == "simulated"
