"""Runs the interpreted checks, one process a file, and makes sure that kernels really ran there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton backend is optional")

FOLDER = Path(__file__).parent / "interpreted"
ROWS = {"rows_forward_kernel", "rows_backward_kernel", "rows_double_backward_kernel"}
HINGE = {"episode_sums_kernel", "hinge_kernel", "hinge_slope_kernel"}
LINEAR = {"linear_forward_kernel", "linear_backward_rows_kernel", "linear_backward_head_kernel"}
MLP = {"inner_loop_kernel", "layer_forward_kernel", "layer_backward_kernel", "layer_update_kernel"}
KERNELS = {
    "check_rows.py": ROWS,
    "check_hinge.py": HINGE,
    "check_linear.py": LINEAR,
    "check_losses.py": {*ROWS, *HINGE},
    "check_mlp.py": {*MLP, "rows_forward_kernel", "rows_backward_kernel"},
    "check_acceptance.py": {*ROWS, *HINGE, *LINEAR, *MLP},
}


def test_every_check_is_run():
    assert {path.name for path in FOLDER.glob("check_*.py")} == set(KERNELS)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_in_the_interpreter(name):
    # numpy warns of the NaN and infinity that these checks feed it on purpose.
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(FOLDER / name)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
    launched = dict(re.findall(r"^launched (\w+) (\d+)$", done.stdout, flags=re.MULTILINE))
    assert set(launched) == KERNELS[name], "each kernel must run in the interpreter, and no other hide among them"
