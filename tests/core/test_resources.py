"""Memory that is given back to the system."""

import platform
import subprocess
import sys

import pytest

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
