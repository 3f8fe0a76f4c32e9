"""What a computation takes of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path

_STATUS, _RESET, _MEMORY = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# A container's limit, what it has taken, and by what name it tells how much of that are files it can give up: v2, v1.
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
# Where nothing tells how much is free.
_SUPPOSED = 1 << 30


class PeakMemory:
    """The most memory that this process holds from here on, beyond what it holds now; Linux alone tells.

    Memory that an allocator kept from before and uses again is not seen, so the number is a lower bound.
    """

    def __init__(self) -> None:
        self._start = None
        try:
            _RESET.write_text("5")  # the peak begins anew at what is held now
            self._start = _read("VmRSS")
        except OSError:
            pass

    def bytes(self) -> int | None:
        """So far; None where the system does not tell."""
        return None if self._start is None else max(0, _read("VmHWM") - self._start)


def free_memory() -> int:
    """The bytes that a process could still take: what the system has, or less where it is in a container with a limit.

    What only caches files counts as free; a gibibyte where the system does not tell.
    """
    try:
        free = _read("MemAvailable", _MEMORY)
    except OSError:
        return _SUPPOSED
    return max(0, min(free, *(_left(*names) for names in _LIMITS)))


def _left(limit: str, taken: str, files: str) -> int:
    """What a container's limit leaves."""
    try:
        counts = dict(line.split() for line in (_CGROUP / limit).with_name("memory.stat").read_text().splitlines())
        most, used = (int((_CGROUP / name).read_text()) for name in (limit, taken))
        return most - used + int(counts[files])
    except (OSError, ValueError, KeyError):  # no such container; "max" is no limit
        return sys.maxsize


def release_memory() -> None:
    """Give what the allocator keeps for later back to the system, where the C library is one that can (glibc).

    Each thread has memory of its own there, whose holes add up over hours.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library; Windows has none to open
        ctypes.CDLL(None).malloc_trim(0)


def _read(name: str, path: Path = _STATUS) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(), flags=re.MULTILINE)
    if found is None:
        raise OSError(f"{path} does not tell {name}")
    return int(found[1]) * 1024
