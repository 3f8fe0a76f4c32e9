"""Without a GPU the acceptance script says so in one line and exits 3."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_acceptance.py"


def test_no_gpu_is_said_in_one_line():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 1
    assert "no GPU" in done.stdout
    assert done.stderr == ""
