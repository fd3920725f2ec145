"""Dollars and joules of device time.

A price is per device and hour, and every device of an instance counts, those of prefill and of
decode alike. Factors of speed are never multiplied here: they change seconds, and seconds cost.
"""

import functools
import re
from dataclasses import dataclass

from kvmesh.backends.devices import device_names, load_device
from kvmesh.backends.devices.device import Device
from kvmesh.backends.errors import DeviceError

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars per device and hour, and where that is from; shown with every figure made of it."""

    per_hour: float
    preset: str
    source: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What some work took of devices. simulated: whether the seconds are."""

    device_seconds: float
    dollars: float
    joules: float
    price: Price
    simulated: bool


def price_of(device: Device, preset: str | None = None, per_hour: float | None = None) -> Price:
    """The price to use: per_hour if given, else the device's preset, else its default.

    Raises DeviceError for a preset that it does not have, no price at all, or a negative one.
    """
    if per_hour is not None:
        if per_hour < 0:
            raise DeviceError(f"price per hour is {per_hour:g}, must be at least 0")
        return Price(per_hour, "given", "given")
    if device.price is None:
        raise DeviceError(f"device {device.name} has no published price; give one per hour")
    name = preset or device.price.default
    figure = device.price.per_hour.get(name)
    if figure is None:
        known = ", ".join(device.price.per_hour)
        raise DeviceError(f"device {device.name} has no price {name!r}; it has: {known}")
    return Price(figure.value, name, f"{figure.source} [{figure.tag}]")


@functools.cache
def listed_price(product: str) -> Price | None:
    """Of the device file that a GPU's product name names ("NVIDIA H100 80GB HBM3": h100), at its
    default preset; None if no file is of it, or it has no price."""
    words = re.findall(r"[a-z0-9]+", product.lower())
    name = next((word for word in words if word in device_names()), None)
    device = load_device(name) if name else None
    return price_of(device) if device is not None and device.price is not None else None


def power_of(device: Device) -> float:
    """Watts that a device stands for: its share of everything around it, else the package.

    Raises DeviceError if neither is published.
    """
    figure = device.power.all_in_w or device.power.tgp_w
    if figure is None:
        raise DeviceError(f"device {device.name} has no published power; its energy is not known")
    return figure.value


def usage(device: Device, device_seconds: float, price: Price, simulated: bool) -> Usage:
    """Dollars and joules of so many seconds of one device, or seconds x devices. Joules are 0 where
    the device's power is not published."""
    watts = device.power.all_in_w or device.power.tgp_w
    joules = device_seconds * watts.value if watts else 0.0
    dollars = device_seconds / HOUR_S * price.per_hour
    return Usage(device_seconds, dollars, joules, price, simulated)


def dollars_per_mtok(per_hour: float, tokens_per_s_device: float) -> float:
    """Dollars per million tokens = price x 1e6 / (3600 x tokens/s per device).

    tokens_per_s_device: of all devices, whatever their part. Raises ValueError if not positive.
    """
    return per_hour * 1e6 / (HOUR_S * _positive(tokens_per_s_device))


def joules_per_token(watts: float, tokens_per_s_device: float) -> float:
    """Raises ValueError if tokens_per_s_device is not positive."""
    return watts / _positive(tokens_per_s_device)


def _positive(tokens_per_s_device: float) -> float:
    if not tokens_per_s_device > 0:
        raise ValueError(f"tokens_per_s_device is {tokens_per_s_device}, must be greater than 0")
    return tokens_per_s_device
