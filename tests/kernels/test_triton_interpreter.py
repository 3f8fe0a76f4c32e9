"""What runs in Triton's interpreter, a process each: the checks of `interpreted/`, and the wiring over the kernels.

Each process takes one thread, and two run at a time.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
PYTEST = ("-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider")
# Of the tests of the wiring those that take the backend from the environment.
CHOSEN = (
    "(test_transform and compiled) or test_head or refused_or_right or test_training_step or one_operator or "
    "around_what_is_compiled or test_autocast"
)
# The longest first, so that the two end together.
COMMANDS = {
    "wiring": (*PYTEST, str(HERE / "test_transforms.py"), str(HERE / "test_compile.py"), "-k", CHOSEN),
    **{name: (*PYTEST, str(FOLDER / name)) for name in KERNELS},
    "parity": ("-m", "mdml_kernels.parity", "--problems", "4"),
}


def run(command):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MDML_TEST_BACKEND": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def printed(request):
    """What a command prints, once it has ended well. Those that the tests chosen want are begun together."""
    items = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    wanted = {item.callspec.params["name"] for item in items}
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(run, command) for name, command in COMMANDS.items() if name in wanted}

        def result(name):
            done = running[name].result()
            assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
            return done.stdout

        yield result


def test_every_check_is_run():
    assert {path.name for path in FOLDER.glob("check_*.py")} == set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_in_the_interpreter(name, printed):
    out = printed(name)
    assert "skipped" not in out
    launched = dict(re.findall(r"^launched (\w+) (\d+)$", out, flags=re.MULTILINE))
    assert set(launched) == KERNELS[name], "each kernel must run in the interpreter, and no other hide among them"


@pytest.mark.parametrize("name", ["wiring"])
def test_transforms_and_compiled_code_give_what_the_definition_gives(name, printed):
    assert int(re.search(r"(\d+) passed", printed(name))[1]) >= 120


@pytest.mark.parametrize("name", ["parity"])
def test_parity(name, printed):
    out = printed(name)
    assert len(re.findall(r"^triton ", out, flags=re.MULTILINE)) >= 3
    assert "0 of" in out
