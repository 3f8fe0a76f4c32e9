"""How the CPU's compiled kernels come about: compiler, cache, threads, and what Python and C++ both write down."""

import ctypes
import os
import subprocess
import sys

import pytest
from mdml_kernels.native import episodes, loader, neighbours, prototypes, rows


def test_a_compiler_is_found():
    assert loader.native().kernels is not None, loader.native().reason


@pytest.fixture(scope="module")
def loss_without(tmp_path_factory):
    """The loss of `status` without compiled kernels."""
    return status(tmp_path_factory.mktemp("without"), MDML_NATIVE="0")[0]


def status(tmp_path, before="", **environment):
    """What a fresh process says of its kernels, and a loss by them; before: what it does first."""
    code = before + (
        "import torch; from mdml_kernels import softmax_margin_loss; from mdml_kernels.native.loader import native;"
        "x = torch.arange(24.).view(1, 4, 6).sin(); ood = torch.tensor([[False, True, False, True]]);"
        "print(softmax_margin_loss(x, ood).item(), '|', native().kernels is not None, '|', native().reason)"
    )
    changed = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=changed)
    loss, found, reason = done.stdout.split("|")
    return float(loss), found.strip() == "True", reason.strip()


def test_compiled_once_and_kept(tmp_path, loss_without):
    loss, found, reason = status(tmp_path)
    assert found, reason
    (kept,) = (tmp_path / "cache" / "mdml-kernels").iterdir()
    made = kept.stat().st_mtime_ns
    assert status(tmp_path) == (loss, True, reason)
    assert kept.stat().st_mtime_ns == made
    assert loss_without == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("exit 7", "a-compiler failed: it ended with 7"), ("echo broken > ${@: -1}", "failed"), (None, "is no command")],
)
def test_without_a_compiler_all_works(tmp_path, loss_without, compiler, reason):
    """One that fails, one that writes no library, and none."""
    named = tmp_path / "a-compiler"
    if compiler is not None:
        named.write_text(f'#!/bin/bash\nif [ "$1" = --version ]; then echo 1; else {compiler}; fi\n')
        named.chmod(0o755)
    loss, found, said = status(tmp_path, CXX=str(named))
    assert not found
    assert reason in said
    assert loss == pytest.approx(loss_without)


def test_a_damaged_library_is_compiled_anew(tmp_path):
    """Cut short, as a full disk or a crash leaves it, it would end the process; empty, it would never load."""
    healthy = status(tmp_path)
    (kept,) = (tmp_path / "cache" / "mdml-kernels").iterdir()
    for size in (kept.stat().st_size // 2, 0):
        os.truncate(kept, size)
        assert status(tmp_path) == healthy
        assert [path.stat().st_size > size for path in kept.parent.iterdir()] == [True]


def test_a_compiler_with_arguments(tmp_path):
    """As `ccache g++` is: env stands in for what calls the other."""
    _, found, reason = status(tmp_path, CXX="env c++")
    assert (found, reason) == (True, "compiled by env c++")


def test_a_user_without_a_home(tmp_path, loss_without):
    """Nor an entry among the users, as in a container that was given a number for one."""
    nobody = "import os; os.getuid = lambda: 54321; os.environ.pop('HOME'); os.environ.pop('XDG_CACHE_HOME');"
    loss, found, reason = status(tmp_path, before=nobody)
    assert not found
    assert "set HOME or XDG_CACHE_HOME" in reason
    assert loss == pytest.approx(loss_without)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file, no folder")
    assert not status(tmp_path)[1]


def test_a_child_process_has_threads_of_its_own():
    """A fork takes no threads along: what waited for those of its parent would wait for ever."""
    code = """
import os, torch
from mdml_kernels.native.threads import shared
done = []
torch.set_num_threads(2)
shared(lambda begin, end: done.append((begin, end)), 8, least=1)
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
shared(lambda begin, end: done.append((begin, end)), 8, least=1)
os._exit(0 if sorted(done) == [(0, 4), (0, 4), (4, 8), (4, 8)] else 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_is_called_after_the_last_line_of_a_script():
    """By a thread that Python waits for, and at exit: no other thread can be started then."""
    code = """
import atexit, threading, time, torch
from mdml_kernels.native.threads import shared
torch.set_num_threads(2)

def call():
    shared(lambda begin, end: print(begin, end), 8, least=1)

def late():
    threading.main_thread().join()
    time.sleep(0.1)
    call()

atexit.register(call)
threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert sorted(done.stdout.splitlines()) == ["0 4", "0 4", "4 8", "4 8"], done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block", rows._BLOCK),
        ("short", rows.SHORT),
        ("ball", neighbours._BALL),
        ("most", neighbours.MOST),
        ("episode_layer", ctypes.sizeof(episodes._Layer)),
        ("episode_program", ctypes.sizeof(episodes._Program)),
        ("prototype_program", ctypes.sizeof(prototypes._Program)),
    ],
)
def test_what_is_written_twice_is_the_same(name, value):
    """In Python and in C++: where they differed, a kernel would write beyond what it was given."""
    assert ctypes.c_int64.in_dll(loader.native().kernels, f"mdml_{name}").value == value
