"""What happens while a command runs: notes and progress, on standard error and in a file of JSON lines."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import typer

# Seconds between two lines of progress: where there is no terminal for a bar, and in the file.
LINE_SECONDS, RECORD_SECONDS = 10.0, 1.0

Item = TypeVar("Item")

Update = Callable[[int, int | None, str], None]
"""Takes what is done, how much there is in all (None: nobody knows), and a detail to show."""


def _on_standard_error(line: str) -> None:
    typer.echo(line, err=True)


@dataclass
class _Log:
    """The settings of this run."""

    quiet: bool = False
    file: TextIO | None = None
    say: Callable[[str], None] = _on_standard_error
    notes: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # of what is logged all along


_log = _Log()


def open_log(quiet: bool, file: Path | None) -> None:
    """Set up notes and progress for the command that runs.

    Args:
        quiet: nothing on standard error but the line that says why a command failed.
        file: where to append JSON lines.

    Raises:
        InputError: the file can't be opened.
    """
    _log.quiet = quiet
    _log.notes.enter_context(_warned_notes())
    _log.notes.enter_context(_logged_notes("mdml_kernels"))
    if file is None:
        return
    try:
        _log.file = file.open("a")
    except OSError as error:
        from mdml_fast.errors import InputError

        raise InputError(f"--log-file {file} cannot be written: {error.strerror}") from error
    record("start", arguments=sys.argv[1:])


def close_log(exit_code: int) -> None:
    """Say in the file how the command ended."""
    record("end", exit_code=exit_code)
    _close_file()
    _log.notes.close()
    _log.quiet = False


def _close_file() -> None:
    file, _log.file = _log.file, None
    if file is not None:
        with contextlib.suppress(OSError):  # a line that could not be written is tried once more
            file.close()


def record(event: str, **fields: Any) -> None:
    """A line in the file, where there is one: the time, the event and its fields."""
    if _log.file is None:
        return
    entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
    try:
        _log.file.write(json.dumps(entry) + "\n")
        _log.file.flush()
    except OSError as error:  # what the command is for goes on
        _close_file()
        note(f"the log file ends here, it cannot be written: {error.strerror}")


def note(message: str) -> None:
    """Something that a user should know about a run that goes on."""
    record("note", message=message)
    if not _log.quiet:
        _log.say(f"note: {message}")


def engine_notes() -> contextlib.AbstractContextManager[None]:
    """What mdml_fast logs (which path and chunk size it chose, its speed), as notes."""
    return _logged_notes("mdml_fast")


@contextlib.contextmanager
def _warned_notes() -> Iterator[None]:
    """Our own warnings, as notes, each once; others are shown as ever."""
    from mdml_fast.errors import MissingValuesWarning

    show, told = warnings.showwarning, set[str]()

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, MissingValuesWarning):
            show(message, category, *where, **more)
        elif str(message) not in told:
            told.add(str(message))
            note(str(message))

    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning = show


@contextlib.contextmanager
def _logged_notes(name: str) -> Iterator[None]:
    """What a package logs, as notes."""
    handler, logger = _Notes(), logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


class _Notes(logging.Handler):
    def emit(self, entry: logging.LogRecord) -> None:
        note(entry.getMessage())


def failed(message: str) -> None:
    """Why a command ends without success; also where it is quiet."""
    record("error", message=message)
    _on_standard_error(f"mdml-fast: {message}")


@contextlib.contextmanager
def resumable(what: str, path: Path) -> Iterator[None]:
    """Say on Ctrl-C where there is something to go on from: what is done so far."""
    try:
        yield
    except KeyboardInterrupt:
        if path.exists():
            note(f"{what} so far is in {path}; the same command with --resume goes on")
        raise


Scalar = Callable[[str, float, int], None]
"""Takes the name of a curve, and its value at a step."""


@contextlib.contextmanager
def curves(folder: Path | None) -> Iterator[Scalar]:
    """Curves for TensorBoard, written to a folder; without one they go nowhere.

    Raises:
        InputError: TensorBoard is not installed.
    """
    if folder is None:
        yield lambda *_: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        from mdml_fast.errors import InputError

        raise InputError("--tensorboard needs TensorBoard: pip install 'mdml-fast[tensorboard]'") from error
    with SummaryWriter(str(folder)) as writer:
        yield writer.add_scalar


@contextlib.contextmanager
def progress(what: str, unit: str = "", *, bar: bool = True) -> Iterator[Update]:
    """Progress as a bar on a terminal, as a line now and then elsewhere; nothing before the first update.

    Args:
        what: is being done.
        unit: of the numbers; with one, its rate is shown.
        bar: False: lines, as what else is printed goes to the terminal too.
    """
    meter = _Meter(unit)
    show = _nothing() if _log.quiet else _bar(what) if bar and sys.stderr.isatty() else _lines(what)

    def keep(news: tuple[int, int | None, str]) -> None:
        done, total, detail = news
        record("progress", what=what, done=done, total=total, detail=detail)

    with show as display, _now_and_then(RECORD_SECONDS, keep) as tell:

        def update(done: int, total: int | None, detail: str = "") -> None:
            text = meter.text(done, total, detail)
            tell((done, total, detail))
            display(done, total, text)

        yield update


@contextlib.contextmanager
def _now_and_then(seconds: float, say: Callable[[Item], None]) -> Iterator[Callable[[Item], None]]:
    """Says the first of what it is told, the last, and one every so many seconds between."""
    said_at, waiting = -math.inf, list[Item]()

    def tell(news: Item) -> None:
        nonlocal said_at
        waiting[:] = [news]
        if time.monotonic() - said_at >= seconds:
            said_at = time.monotonic()
            say(waiting.pop())

    try:
        yield tell
    finally:
        if waiting:
            say(waiting.pop())


@dataclass
class _Meter:
    """How fast it goes: since the first update, because what came before was no steady work."""

    unit: str
    start: tuple[float, int] | None = field(default=None, init=False)

    def text(self, done: int, total: int | None, detail: str) -> str:
        """``1,024 of 10,000 rows, 7,000 rows/s, 0:00:01 left, detail``."""
        now = time.monotonic()
        self.start = self.start or (now, done)
        began, first = self.start
        rate = (done - first) / (now - began) if now > began else 0.0
        parts = [f"{done:,}{f' of {total:,}' if total is not None else ''} {self.unit}".rstrip()]
        if self.unit and rate:
            parts.append(f"{rate:,.0f} {self.unit}/s")
        if total is not None and rate and total > done:
            parts.append(f"{timedelta(seconds=round((total - done) / rate))} left")
        return ", ".join([*parts, *([detail] if detail else [])])


Display = Callable[[int, int | None, str], None]


@contextlib.contextmanager
def _nothing() -> Iterator[Display]:
    yield lambda *_: None


@contextlib.contextmanager
def _lines(what: str) -> Iterator[Display]:
    with _now_and_then(LINE_SECONDS, lambda text: _on_standard_error(f"{what}: {text}")) as tell:
        yield lambda _done, _total, text: tell(text)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Display]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}", markup=False))
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(what, total=None, text="")

    def display(done: int, total: int | None, text: str) -> None:
        bar.start()
        bar.update(task, completed=done, total=total, text=text)

    # A note would end on the bar's line otherwise.
    _log.say = partial(bar.console.print, markup=False, highlight=False, soft_wrap=True)
    try:
        yield display
    finally:
        _log.say = _on_standard_error
        if bar.live.is_started:
            bar.stop()
