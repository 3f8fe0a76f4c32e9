"""What a computation takes of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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


def release_memory() -> None:
    """Give what the allocator keeps for later back to the system, where the C library is one that can (glibc).

    Each thread has memory of its own there, whose holes add up over hours.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library; Windows has none to open
        ctypes.CDLL(None).malloc_trim(0)


def _read(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), flags=re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} does not tell {name}")
    return int(found[1]) * 1024
