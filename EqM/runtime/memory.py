"""The memory of this machine."""

from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of a container or a job with a limit of its own


def free_bytes():
    """Bytes that processes may still take: of the machine or, if that is less, of the limit of its container."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # no such limit: no such file, or "max" in it
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free
