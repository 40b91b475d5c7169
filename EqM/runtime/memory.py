"""The memory of this machine."""

import math
import sys
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of a container (cgroup v2); limits of jobs are in folders below and don't count


def free_bytes():
    """Bytes that processes may still take, of the machine and of its container; infinite if not known (not Linux)."""
    if sys.platform != "linux":
        return math.inf
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # no such limit: no such file, or "max" in it
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))  # the cache of files that were read gives way
    return free
