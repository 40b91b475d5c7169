"""The memory of this machine."""

import math
import sys
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of a container (cgroup v2); job limits in subfolders are ignored


def pinned_bytes(num_bytes):
    """Return the bytes that torch takes for a pinned tensor of num_bytes: a power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def free_bytes():
    """Bytes of memory that are free on the machine and in its container.

    Infinite if unknown (not Linux).
    """
    if sys.platform != "linux":
        return math.inf
    lines = Path("/proc/meminfo").read_text().splitlines()
    machine = dict(line.split(":") for line in lines)  # "MemAvailable: 1024 kB"
    free = int(machine["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # without a limit there is no such file, or "max" in it
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
        free = min(free, limit - used + int(stat["inactive_file"]))  # the file cache can be freed
    return free
