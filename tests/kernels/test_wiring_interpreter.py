"""The same wiring over the Triton kernels, in the interpreter: transforms against the definition, and parity."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton backend is optional")
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MDML_TEST_BACKEND": "triton"}
# What a launch costs in the interpreter keeps this to the transforms that batch each argument, and forward mode.
CHOSEN = "test_transform and (bce or hinge or pairwise) and (grad or jvp or create_graph) and not third"


def run(*command):
    done = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_transforms():
    file = Path(__file__).with_name("test_transforms.py")
    # numpy warns of the NaN and infinity that masked lanes compute with.
    out = run("-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider", str(file), "-k", CHOSEN)
    assert int(re.search(r"(\d+) passed", out)[1]) >= 12


def test_parity():
    out = run("-m", "mdml_kernels.parity", "--problems", "4")
    assert len(re.findall(r"^triton ", out, flags=re.MULTILINE)) >= 3
    assert "0 of" in out
