"""Seconds of collectives, from a device's links and the measured share of them."""

from kvmesh.backends.devices.device import Device


class Links:
    """Collectives of one device's kind among `ranks` ranks. Sizes are bytes per rank."""

    def __init__(self, device: Device, ranks: int) -> None:
        self._ranks = ranks
        found = device.efficiency
        up, out = device.scale_up.bandwidth_bytes_s.value, device.scale_out.bandwidth_bytes_s.value
        self._reduce_share = found.all_reduce.link.value if found else 1.0
        self._reduce_floor = found.all_reduce.floor_s.value if found else _latency(device)
        self._one_shot = found.all_reduce.one_shot_bytes.value if found else 0.0
        self._exchange_share = found.all_to_all.link.value if found else 1.0
        self.dispatch_floor_s = found.all_to_all.dispatch_floor_s.value if found else 0.0
        self.combine_floor_s = found.all_to_all.combine_floor_s.value if found else 0.0
        self._up, self._out = up, out
        self._inside = min(ranks, device.domain)
        self._domains = -(-ranks // device.domain)
        self._out_latency = device.scale_out.latency_s.value if device.scale_out.latency_s else 0.0

    def all_reduce_s(self, size: float) -> float:
        """Up to one_shot_bytes every rank reads all others' data; above, a reduce-scatter and an
        all-gather. Domains are joined by a ring over the scale-out link."""
        if self._ranks == 1 or size <= 0:
            return 0.0
        n, share = self._inside, self._reduce_share
        moved = (n - 1) * size if size <= self._one_shot else 2 * (n - 1) / n * size
        seconds = self._reduce_floor + moved / (self._up * share)
        if self._domains > 1:
            d = self._domains
            seconds += self._out_latency + 2 * (d - 1) / d * size / n / (self._out * share)
        return seconds

    def exchange_byte_s(self) -> float:
        """Seconds per byte that comes to a rank in an all-to-all, from anywhere."""
        if self._ranks == 1:
            return 0.0
        outside = (self._ranks - self._inside) / (self._ranks - 1)
        worst = max((1 - outside) / self._up, outside / self._out)
        return worst / self._exchange_share

    @property
    def exchange_latency_s(self) -> float:
        return self._out_latency if self._domains > 1 else 0.0


def host_gap_s(device: Device, sequences: float) -> float:
    """Between two steps of so many sequences, in which a device waits for its host."""
    if device.efficiency is None:
        return 0.0
    host = device.efficiency.host
    return host.step_s.value + host.sequence_s.value * sequences


def _latency(device: Device) -> float:
    return device.scale_up.latency_s.value if device.scale_up.latency_s else 0.0


def stage_hop_s(device: Device, size: float, devices: int) -> float:
    """To hand `size` bytes to the next stage of a pipeline of so many devices in all."""
    if devices > device.domain or device.domain == 1:
        latency = device.scale_out.latency_s.value if device.scale_out.latency_s else 0.0
        return latency + size / device.scale_out.bandwidth_bytes_s.value
    return _latency(device) + size / device.scale_up.bandwidth_bytes_s.value
