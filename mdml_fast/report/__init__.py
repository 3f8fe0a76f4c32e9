"""The report: one HTML file that says what a model knows, how well it separates, and why rows were flagged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mdml_fast.errors import InputError
from mdml_fast.files import replace_file

if TYPE_CHECKING:
    import pyarrow as pa

    from mdml_fast.data.labelled import Names
    from mdml_fast.detector import MDMLDetector


def write_report(
    detector: MDMLDetector, path: Path, rows: pa.Table | None = None, labels: Names | None = None, title: str = "model"
) -> None:
    """Write the report; the file needs no network, and appears whole or not at all.

    Args:
        detector: the model.
        path: where to write.
        rows: what to score, best rows that nothing was learned from; None leaves out all that needs rows.
        labels: the class of each row [N]; None leaves out how well classes are separated.
        title: names the model.

    Raises:
        InputError: there is no such folder, or the rows can't be scored.
        OSError: it cannot be written.
    """
    from mdml_fast.report.content import report_content
    from mdml_fast.report.page import render

    if not path.parent.is_dir():
        raise InputError(f"no such folder: {path.parent}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file")
    page = render(report_content(detector, rows, labels), title)
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
