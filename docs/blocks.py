"""The code blocks of a page: run them as a reader would, and hold what the page shows against what they print.

A page is Markdown with two kinds of code, fenced ```python and ```bash, which are run from the top in one empty folder
(with the tables of `example.py` in it) and, for Python, one namespace. A ```text block is what the block before it
prints, and nothing else. `python docs/blocks.py [PAGE …]` writes these anew.

- Numbers may differ, and the width of tables: what is held is the shape. A line of `…` stands for any lines, and `…` at
  the end of a line for any rest of it.
- A command that is meant to be refused says so in a comment: `# exits 2`. Then what it says on standard error counts.
- `pip install …` is not run, what follows it on its line is: the installation is what CI does, and so is `pytest`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# What a command that trains on the example printed and wrote, for the other pages that show it.
TRAIN = re.compile(r"^mdml-fast train flows\.parquet .*--out model$")
trained: dict[str, tuple[str, dict[str, bytes]]] = {}
FENCE = re.compile(r"^```(?P<language>.*)\n(?P<code>(?:(?!```).*\n)*)^```$", re.MULTILINE)
EXPECTED_EXIT = re.compile(r"#\s*exits (\d+)\s*$")
NUMBER = re.compile(r"(?<![A-Za-z_])[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?")
SHELL_SYNTAX = re.compile(r"[|<>;&$`]")
INSTALLATION = re.compile(r"^pip install [^&]*(&& )?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: what stands behind the fence.
        code: its lines.
        line: the number, from 1, of the first of them.
        start: where the code begins in the page.
        end: and where it ends.
    """

    language: str
    code: str
    line: int
    start: int
    end: int


def pages() -> list[Path]:
    """Every page whose code is run; that of kernels/README.md has tests of its own."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [
        Block(
            found["language"],
            found["code"],
            text.count("\n", 0, found.start("code")) + 1,
            found.start("code"),
            found.end("code"),
        )
        for found in FENCE.finditer(text)
    ]


class Reader:
    """Runs the blocks of one page, one after the other, in a folder."""

    def __init__(self, page: str, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.names: dict[str, Any] = {"__name__": "page"}

    def run(self, block: Block) -> str:
        """What the block prints.

        Raises:
            AssertionError: a command ends otherwise than the page says.
            Exception: what the Python code raises.
        """
        with _in(self.folder):
            return self._python(block) if block.language == "python" else self._commands(block)

    def _python(self, block: Block) -> str:
        # Empty lines before it, so that a traceback has the page's line numbers.
        code = compile("\n" * (block.line - 1) + block.code, self.page, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self.names)
        return printed.getvalue()

    def _commands(self, block: Block) -> str:
        printed = []
        for line in block.code.replace("\\\n", " ").splitlines():
            command = " ".join(INSTALLATION.sub("", line).split())
            if not command or command.startswith("#") or command == "pytest":
                continue
            if known := trained.get(command):
                Path("model").mkdir(exist_ok=True)
                for name, content in known[1].items():
                    (Path("model") / name).write_bytes(content)
                printed.append(known[0])
                continue
            expected = int(found[1]) if (found := EXPECTED_EXIT.search(command)) else 0
            code, out, err = _here(command) or _in_a_shell(command)
            assert code == expected, f"{self.page}:{block.line}: {command!r} exits {code}, not {expected}:\n{out}{err}"
            printed.append(out + (err if expected else ""))
            if TRAIN.match(command):
                trained[command] = out, {path.name: path.read_bytes() for path in Path("model").iterdir()}
        return "".join(printed)


def _here(command: str) -> tuple[int, str, str] | None:
    """`mdml-fast …` without a process of its own, which would take seconds to import torch; None for anything else."""
    program, *arguments = shlex.split(command, comments=True)
    if program != "mdml-fast" or SHELL_SYNTAX.search(command):
        return None
    from mdml_cli.app import run

    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = run(arguments)
    return code, out.getvalue(), err.getvalue()


def _in_a_shell(command: str) -> tuple[int, str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    """In that folder, before a terminal of 92 columns."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "92"
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def shape(text: str) -> list[str]:
    """The lines of an output without what may differ: numbers, and the widths that come of them."""
    lines = []
    for line in text.splitlines():
        words = re.sub(r"[─━]+", "─", NUMBER.sub("#", line))
        # A centred title moves with its table.
        words = re.sub(r"\s+", " ", re.sub(r"(?<=[┃│]) +| +(?=[┃│])", "", words)).strip()
        if words:
            lines.append(words)
    return lines


def agrees(shown: str, printed: str) -> bool:
    """Whether what a page shows has the shape of what was printed."""
    parts = []
    for line in shape(shown):
        if line == "…":
            parts.append(r"(.*\n)*")
        elif line.endswith("…"):
            parts.append(re.escape(line[:-1].rstrip()) + r".*\n")
        else:
            parts.append(re.escape(line) + r"\n")
    return re.fullmatch("".join(parts), "".join(f"{line}\n" for line in shape(printed))) is not None


def runs(page: Path, folder: Path) -> Iterator[tuple[Block, Block | None, str]]:
    """Run a page; gives each block of code, the block of output that belongs to it, and what it printed."""
    from example import write

    write(folder)
    reader, found = Reader(str(page.relative_to(ROOT)), folder), blocks(page.read_text())
    for place, block in enumerate(found):
        if block.language == "text":
            continue
        follower = found[place + 1] if place + 1 < len(found) else None
        shown = follower if follower and follower.language == "text" else None
        yield block, shown, reader.run(block)


def refresh(page: Path) -> bool:
    """Write the outputs that a page shows anew, those with an `…` only if their shape is another; True if any was."""
    text = page.read_text()
    changes: list[tuple[Block, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _, shown, printed in runs(page, Path(folder)):
            kept = shown and "…" in shown.code and agrees(shown.code, printed)
            if shown and not kept:
                lines = [line.rstrip() for line in printed.strip("\n").splitlines()]
                changes.append((shown, "".join(f"{line}\n" for line in lines)))
    new = text
    for shown, code in reversed(changes):
        new = new[: shown.start] + code + new[shown.end :]
    page.write_text(new)
    return new != text


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or pages():
        print(f"{path.relative_to(ROOT)}: {'written anew' if refresh(path) else 'as it was'}")
