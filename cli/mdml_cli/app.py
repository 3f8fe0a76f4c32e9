"""`mdml-fast`: the commands, and how each ends: 0 done, 2 bad input (one line), 1 our own failure, 130 Ctrl-C."""

from __future__ import annotations

import errno
import io
import sys
import traceback

import typer

from mdml_cli import log
from mdml_cli.bench import bench
from mdml_cli.doctor import doctor
from mdml_cli.evaluate import evaluate
from mdml_cli.export import export
from mdml_cli.report import report
from mdml_cli.score import score
from mdml_cli.train import train

app = typer.Typer(
    help="Catch anomalies of kinds nobody has labelled yet.",
    add_completion=False,
    rich_markup_mode=None,
)
for command in (train, score, evaluate, export, report, bench, doctor):
    app.command()(command)

# Writing failed for a reason outside the program, which only the user can mend.
_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
}
STOPPED = 130


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal can't show is no reason to fail
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run one command; its exit code."""
    exit_code = 1
    try:
        exit_code = _run(args)
    finally:
        log.close_log(exit_code)
    return exit_code


def _run(args: list[str]) -> int:
    from mdml_fast.errors import InputError

    try:
        exit_code = int(app(args or ["--help"], prog_name="mdml-fast", standalone_mode=False) or 0)
        if exit_code == STOPPED:
            raise KeyboardInterrupt  # which typer has caught
        return exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "mdml-fast"
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return _refuse(f"{message} (see '{where} --help')")
    except InputError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            return _fail()
        return _refuse(f"cannot write: {error.strerror}{f': {error.filename}' if error.filename else ''}")
    except (KeyboardInterrupt, typer.Abort):
        log.failed("stopped")
        return STOPPED
    except Exception:
        return _fail()


def _refuse(message: str) -> int:
    log.failed(" ".join(message.split()))
    return 2


def _fail() -> int:
    traceback.print_exc()
    log.failed("this is a failure of mdml-fast itself; please report it with the lines above")
    return 1
