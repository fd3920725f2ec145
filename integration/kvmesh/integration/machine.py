"""What machine a figure was measured on."""

import os
import platform


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
