"""What a request has taken of devices, and what that is in dollars. Pure.

It is on one worker at a time; each stay has the price of that worker's devices. Seconds of
simulated and of measured devices are never added: of a request with both, only the stays are told.
"""

from collections.abc import Iterable

from kvmesh.v1 import inference_pb2, mesh_pb2, worker_pb2

HOUR_S = 3600.0
MEASURED, SIMULATED, MIXED = "measured", "simulated", "mixed"


class Bill:
    """The stays of one request, in order."""

    def __init__(self) -> None:
        self.stays: list[inference_pb2.DeviceUse] = []
        self._simulated_s = 0.0  # of the stays that are over
        self._present_s = 0.0

    def arrive(self, member: mesh_pb2.Member) -> None:
        """It goes to that worker; what it took of the one before is final."""
        self._simulated_s += self._present_s
        self._present_s = 0.0
        self.stays.append(
            inference_pb2.DeviceUse(
                worker=member.member_id,
                device=member.device,
                count=max(1, member.devices),
                simulated=member.simulated,
                price_usd_h=member.price_usd_h,
                price_source=member.price_source,
            )
        )

    def note(self, seconds: worker_pb2.DeviceSeconds) -> None:
        """What it has taken of its present worker so far."""
        stay = self.stays[-1]
        stay.queue_s, stay.prefill_s = seconds.queue_s, seconds.prefill_s
        stay.decode_s, stay.kv_s = seconds.decode_s, seconds.kv_s
        self._present_s = seconds.simulated_s

    @property
    def simulated_s(self) -> float:
        """Since its arrival, by the clocks of the simulated devices that it was on."""
        return self._simulated_s + self._present_s

    def fill(self, usage: inference_pb2.Usage) -> None:
        """Writes the bill into `usage`. Twice is safe."""
        del usage.devices[:]
        usage.devices.extend(self.stays)
        usage.simulated_duration_s = self.simulated_s
        usage.cost_kind = kind_of(self.stays)
        usage.device_s = usage.cost_usd = 0.0
        usage.ClearField("cost_split")
        if usage.cost_kind not in (MEASURED, SIMULATED):
            return
        usage.device_s = sum(device_seconds(stay) for stay in self.stays)
        if priced(self.stays):
            split = split_of(self.stays)
            usage.cost_split.CopyFrom(split)
            usage.cost_usd = dollars(split)


def kind_of(stays: Iterable[inference_pb2.DeviceUse]) -> str:
    """measured, simulated, mixed; empty for no stays."""
    kinds = {SIMULATED if stay.simulated else MEASURED for stay in stays}
    return MIXED if len(kinds) > 1 else kinds.pop() if kinds else ""


def priced(stays: Iterable[inference_pb2.DeviceUse]) -> bool:
    """Whether each device that was used has a price."""
    return all(stay.price_usd_h for stay in stays if device_seconds(stay))


def device_seconds(stay: inference_pb2.DeviceUse) -> float:
    """Seconds x devices."""
    return stay.count * (stay.queue_s + stay.prefill_s + stay.decode_s + stay.kv_s)


def dollars(split: inference_pb2.CostSplit) -> float:
    return split.queue_usd + split.prefill_usd + split.decode_usd + split.kv_usd


def split_of(stays: Iterable[inference_pb2.DeviceUse]) -> inference_pb2.CostSplit:
    """Dollars = seconds x devices x price per hour / 3600."""
    split = inference_pb2.CostSplit()
    for stay in stays:
        rate = stay.count * stay.price_usd_h / HOUR_S
        split.queue_usd += stay.queue_s * rate
        split.prefill_usd += stay.prefill_s * rate
        split.decode_usd += stay.decode_s * rate
        split.kv_usd += stay.kv_s * rate
    return split
