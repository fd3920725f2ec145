"""Devices as data: one TOML file each, every number with its tag and its source."""

from kvmesh.backends.devices.device import Device, Figure
from kvmesh.backends.devices.library import device_names, load_device

__all__ = ["Device", "Figure", "device_names", "load_device"]
