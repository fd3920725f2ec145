"""How much memory this machine has, and the processor's name."""

import platform
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")


def memory_bytes(field: str, default: int) -> int:
    """A field of /proc/meminfo, such as MemTotal or MemAvailable; `default` where there is none."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return default
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return default


def processor_name() -> str:
    """What the processor calls itself, else its architecture."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
