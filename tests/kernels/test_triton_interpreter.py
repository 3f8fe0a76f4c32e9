"""What runs in Triton's interpreter, a process each: the checks of `interpreted/`, and the wiring over the kernels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton backend is optional")

HERE = Path(__file__).parent
FOLDER = HERE / "interpreted"
ROWS = {"rows_forward_kernel", "rows_backward_kernel", "rows_double_backward_kernel"}
HINGE = {"episode_sums_kernel", "hinge_kernel", "hinge_slope_kernel"}
LINEAR = {"linear_forward_kernel", "linear_backward_rows_kernel", "linear_backward_head_kernel"}
MLP = {"inner_loop_kernel", "layer_forward_kernel", "layer_backward_kernel", "layer_update_kernel"}
KERNELS = {
    "check_mlp.py": {*MLP, "rows_forward_kernel", "rows_backward_kernel"},
    "check_linear.py": LINEAR,
    "check_acceptance.py": {*ROWS, *HINGE, *LINEAR, *MLP},
    "check_rows.py": ROWS,
    "check_losses.py": {*ROWS, *HINGE},
    "check_hinge.py": HINGE,
}
# numpy warns of the NaN and infinity that checks feed it on purpose, and that masked lanes compute with.
PYTEST = ("-m", "pytest", "-n0", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider")
# Of the tests of the wiring those that take the backend from the environment.
CHOSEN = (
    "(test_transform and compiled) or test_head or refused_or_right or test_training_step or one_operator or "
    "around_what_is_compiled or test_autocast"
)
WIRING = (*PYTEST, str(HERE / "test_transforms.py"), str(HERE / "test_compile.py"), "-k", CHOSEN)


def printed(command):
    """What a command prints, which has to end well."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MDML_TEST_BACKEND": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_every_check_is_run():
    assert {path.name for path in FOLDER.glob("check_*.py")} == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_in_the_interpreter(name):
    out = printed((*PYTEST, str(FOLDER / name)))
    assert "skipped" not in out
    launched = dict(re.findall(r"^launched (\w+) (\d+)$", out, flags=re.MULTILINE))
    assert set(launched) == KERNELS[name], "each kernel must run in the interpreter, and no other hide among them"


def test_transforms_and_compiled_code_give_what_the_definition_gives():
    assert int(re.search(r"(\d+) passed", printed(WIRING))[1]) >= 120


def test_parity():
    out = printed(("-m", "mdml_kernels.parity", "--problems", "4"))
    assert len(re.findall(r"^triton ", out, flags=re.MULTILINE)) >= 3
    assert "0 of" in out
