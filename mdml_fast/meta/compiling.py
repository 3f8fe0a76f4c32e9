"""`torch.compile` where it pays, and never at the cost of a run.

Compiling goes on in a process of its own, which leaves what it made in torch's cache on disk, while a run computes as
it is. From a step on that depends on the work and the threads alone, not on the clock, the run takes that over: the
same run in the same chunks has the same bits each time. (A thread of this process would not do: torch restores the
state of its random numbers after compiling, and tells all threads meanwhile that they are compiled.)
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves

from mdml_fast.errors import first_line

Compile = bool | Literal["auto"]

log = logging.getLogger("mdml_fast")

# Floating point operations a second of one core where calls cost as much as the arithmetic; of what compiled code
# saves there (measured: half of the time and more) a run must earn a minute, twice what compiling takes.
_RATE, _WORTHWHILE_SECONDS = 2e10, 60.0
# So long compiling may take in the other process before the run waits for it, and so long it waits.
_BACKGROUND_SECONDS, _PATIENCE_SECONDS = 30.0, 300.0


def first_compiled_step(flops: float, n_steps: int, n_threads: int) -> int | None:
    """The step of a run from which on it is worth being compiled; None where the run is too short.

    Args:
        flops: of a step.
        n_steps: of the whole run.
        n_threads: CPU threads that share it.
    """
    seconds = flops / _RATE / n_threads
    if seconds * n_steps / 2 < _WORTHWHILE_SECONDS:
        return None
    first = math.ceil(_BACKGROUND_SECONDS / seconds)
    return first if first < n_steps else None


class Compiled:
    """A function compiled for arguments of one shape, on threads that compute as this one does.

    Args:
        function: of tensors and dicts of them.
        args: such arguments.

    Raises:
        Exception: whatever a compiler comes up with.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = torch.compile(function, dynamic=False, fullgraph=True)
        self._circumstances = _circumstances(args)
        self._function(*args)

    def takes(self, args: tuple[Any, ...]) -> bool:
        """Whether it was compiled for arguments like these, on a thread like this one."""
        return _circumstances(args) == self._circumstances

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        return self._function(*args)


def _circumstances(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What torch compiles for; in others it would compile again, in the middle of a step."""
    leaves = [(leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad) for leaf in tree_leaves(args)]
    return leaves, torch.get_num_threads(), torch.is_grad_enabled()


def give_up(reason: str) -> None:
    """Tell why a run goes on without being compiled."""
    log.warning("engine: goes on without torch.compile, which failed: %s", reason)


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


class Background:
    """A process that does a job, a compilation: what it makes stays in torch's cache on disk.

    Args:
        job: what to do, on one thread.
        folder: an empty one, for as long as it takes.
    """

    def __init__(self, job: Callable[[], object], folder: Path) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._output = folder / "output"
        # Modules may be of any script or folder that this process knows.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path)}
        command = [sys.executable, "-c", f"from {__name__} import child; child()", str(folder / "job")]
        try:
            torch.save(job, folder / "job")
            with self._output.open("wb") as output:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
                )
        except Exception as error:  # modules that can't be pickled, of whatever kind; no memory, no process
            give_up(reason_of(error))

    def succeeded(self) -> bool:
        """Whether the job was done; waits for its end, and tells why it failed."""
        if self._process is None:
            return False
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            give_up(f"it did not end in {_PATIENCE_SECONDS:g} s")
            return False
        if self._process.returncode:
            last = self._output.read_text(errors="replace").strip().rpartition("\n")[2]
            give_up(last or f"the process ended with {self._process.returncode}")
        return self._process.returncode == 0

    def stop(self) -> None:
        """End it, if it has not ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def in_background(job: Callable[[], object]) -> Iterator[Background]:
    """Do a job for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="mdml-fast-", ignore_cleanup_errors=True) as folder:
        background = Background(job, Path(folder))
        try:
            yield background
        finally:
            background.stop()


def child() -> None:
    """The other process."""
    torch.set_num_threads(1)
    try:
        # This user's own file, written a moment ago for this process alone.
        torch.load(sys.argv[1], weights_only=False)()
    except Exception as error:  # whatever a compiler comes up with
        sys.exit(reason_of(error))
