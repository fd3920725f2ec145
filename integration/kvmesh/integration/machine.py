"""What machine a figure was measured on."""

import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Processor, usable cores, memory and system in one line."""
    name = platform.processor() or platform.machine()
    memory = 0
    try:
        with open("/proc/cpuinfo") as info:
            names = [
                line.split(":", 1)[1].strip() for line in info if line.startswith("model name")
            ]
        name = names[0] if names else name
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except OSError:
        pass  # not Linux: the platform's word for it stands
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {memory / 2**30:.0f} GiB, {platform.system()}"


def cpu_seconds(pid: int) -> float | None:
    """User and system time of a process so far; None where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # The command's name, in parentheses, may hold blanks; utime is field 14 of the line.
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
