"""The compiled kernels: found in the user's cache, or compiled into it in some seconds, once for each machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch

log = logging.getLogger("mdml_kernels")

_HERE = Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")
# No errno and no traps: neither is looked at, and both stand in the way of vectors. Not -ffast-math, which drops NaN.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_SECONDS = 300


class Native(NamedTuple):
    """The library, or None; and in a few words what it was made by, or why there is none."""

    kernels: ctypes.CDLL | None
    reason: str


@functools.cache
def native() -> Native:
    """The kernels for this machine. ``MDML_NATIVE=0`` in the environment does without."""
    if os.environ.get("MDML_NATIVE") == "0":
        return Native(None, "MDML_NATIVE=0")
    named = os.environ.get("CXX")
    commands = [shlex.split(named)] if named else [[name] for name in _COMPILERS]
    compiler = next((command for command in commands if command and shutil.which(command[0])), None)
    if compiler is None:
        return Native(None, f"{named} is no command" if named else "no C++ compiler was found")
    name = " ".join([Path(compiler[0]).name, *compiler[1:]])
    try:
        return Native(_loaded(compiler), f"compiled by {name}")
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()
        return Native(None, f"{name} failed: {said[0] if said else f'it ended with {error.returncode}'}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Native(None, f"{name} failed: {error}")


def cache_folder(name: str = "mdml-kernels") -> Path:
    """Where compiled kernels are kept, or what else has a name in the user's cache.

    Raises:
        OSError: there is no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name
    except RuntimeError:  # a container's user may have none
        raise OSError("there is no home folder to keep kernels in: set HOME or XDG_CACHE_HOME") from None


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: float32 on a CPU, plain memory that no tracer or mode is looking at."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and _python_dispatch._len_torch_dispatch_stack() == 0  # type: ignore[attr-defined]
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in _PLAIN for t in tensors)
        and native().kernels is not None
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def multiplies_bfloat16() -> bool:
    """Whether this machine's processor does, and the kernels with it; else they round what they multiply in float32."""
    kernels = native().kernels
    return kernels is not None and bool(kernels.mdml_has_bfloat16())


def _loaded(compiler: list[str]) -> ctypes.CDLL:
    """The library; compiled where this source, compiler and processor have not met before, or what they made is broken.

    One that was cut short would end the process that loads it, so its name says what it holds.
    """
    sources, headers = sorted(_HERE.glob("*.cpp")), sorted(_HERE.glob("*.h"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    facts = [version, _processor(), *_FLAGS, *(path.read_text() for path in [*sources, *headers])]
    made_of, folder = _digest("\0".join(facts).encode()), cache_folder()
    for library in folder.glob(f"{made_of}-*.so"):
        if library.stem == f"{made_of}-{_digest(library.read_bytes())}":
            return ctypes.CDLL(str(library))
        library.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    log.info("%s compiles the kernels for this processor: once, for some seconds", compiler[0])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "made.so"
        _compile(compiler, sources, made)
        library = made.replace(folder / f"{made_of}-{_digest(made.read_bytes())}.so")
    return ctypes.CDLL(str(library))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _compile(compiler: list[str], sources: list[Path], library: Path) -> None:
    objects = [str(library.with_name(f"{source.stem}.o")) for source in sources]
    with ThreadPoolExecutor() as pool:
        done = [
            pool.submit(_run, [*compiler, *_FLAGS, "-c", str(source), "-o", to])
            for source, to in zip(sources, objects, strict=True)
        ]
    for each in done:
        each.result()
    _run([*compiler, *_FLAGS, "-shared", *objects, "-o", str(library)])


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
