"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mdml_fast.errors import InputError


def check_parent(path: Path) -> None:
    """Raise InputError where there is no folder to write it to."""
    if not path.parent.is_dir():
        raise InputError(f"no such folder: {path.parent}")


def check_file(path: Path, endings: Sequence[str] = ()) -> None:
    """Raise InputError where no file, of these endings, can be written, or what is no file would be replaced."""
    check_parent(path)
    if path.exists() and not path.is_file():
        kind, one_of = "a folder" if path.is_dir() else "no regular file", f": {', '.join(endings)}" if endings else ""
        raise InputError(f"{path} is {kind}; give a file{one_of}")


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there replaces `path` when the block ends without error.

    A link stays one: what it leads to is replaced.
    """
    path = path.resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; it replaces `path`, as in `replace_file`, when the block ends without error."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            _exchange(temporary, path)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _exchange(new: Path, path: Path) -> None:
    """Put the new folder in the place of the old one, which is put back should that fail, and else deleted."""
    old = Path(f"{new}.old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
