"""Memory that is given back to the system, and what is free of it."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mdml_fast import resources

# The block allocated last keeps the allocator from giving back those before it by itself.
PROGRAM = """
from mdml_fast.resources import _read, release_memory
blocks = [bytearray(20_000) for _ in range(10_000)]
del blocks[:-1]
before = _read("VmRSS")
release_memory()
print(before - _read("VmRSS"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_the_allocator_keeps_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 * 2**20


V2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file")
MIB = 2**20


@pytest.mark.parametrize("names", [V2, V1])
@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", 100), (str(2**63 - 4096), 100), (str(70 * MIB), 30), (str(300 * MIB), 100), (str(10 * MIB), 0)],
)
def test_memory_that_is_free_is_what_the_system_and_a_container_leave(
    names: tuple[str, ...], limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 MiB that the container has taken 20 cache files."""
    (tmp_path / "meminfo").write_text(f"MemFree: 10 kB\nMemAvailable:   {100 * 1024} kB\n")
    (tmp_path / "memory").mkdir()
    stat = f"anon {40 * MIB}\n{names[-1]} {20 * MIB}\n"
    for name, text in zip(names, (limit, str(60 * MIB), stat), strict=False):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(resources, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    assert resources.free_memory() == expected * MIB


def test_where_the_system_does_not_tell_there_is_some_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_MEMORY", tmp_path / "none")
    assert resources.free_memory() == 2**30
