"""The report: one HTML file that says what a model knows, how well it separates, and why rows were flagged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mdml_fast.files import check_file, replace_file

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
        InputError: no file can be written there, or the rows can't be scored.
        OSError: it cannot be written.
    """
    from mdml_fast.report.content import report_content
    from mdml_fast.report.page import render

    check_file(path)
    page = render(report_content(detector, rows, labels), title)
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
