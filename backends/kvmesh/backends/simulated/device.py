"""A device file as the mesh sees it."""

from kvmesh.backends.base import DeviceInfo
from kvmesh.backends.cost.price import price_of
from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import DeviceError


def device_info(device: Device, count: int, name: str, kv_ratio: float) -> DeviceInfo:
    """So many of a device. kv_ratio: bytes of KV that are moved for each of the model's own."""
    try:
        price = price_of(device)
        per_hour, source = price.per_hour, f"{price.preset}: {price.source}"
    except DeviceError:
        per_hour, source = 0.0, ""
    out, power = device.scale_out, device.power.all_in_w or device.power.tgp_w
    return DeviceInfo(
        name=name,
        kind="simulated",
        architecture=device.architecture,
        memory_bytes=int(device.memory.bytes.value) * count,
        bandwidth_bytes_s=device.memory.bandwidth_bytes_s.value * count,
        peak_flops=tuple((dtype, peak.value * count) for dtype, peak in device.peak.items()),
        power_w=power.value * count if power else 0.0,
        price_per_hour=per_hour,
        price_source=source,
        count=count,
        transfer_byte_s=kv_ratio / (out.bandwidth_bytes_s.value * count),
        transfer_base_s=out.latency_s.value if out.latency_s else 0.0,
    )
