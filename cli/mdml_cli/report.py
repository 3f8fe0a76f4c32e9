"""`mdml-fast report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdml_cli import log, output
from mdml_cli.options import JsonOption, ThreadsOption, set_threads


def report(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder that train wrote.")],
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATA]", show_default=False, help="A table to score, best one not trained on; - is standard input."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="DATA's column of classes: shows how well they are told apart.")
    ] = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Write one HTML file, open to anybody without a network: the model, its separation, its alarms and why."""
    from mdml_fast.data.batches import read_wanted
    from mdml_fast.data.labelled import class_names
    from mdml_fast.detector import MDMLDetector
    from mdml_fast.errors import InputError
    from mdml_fast.report import write_report

    log.open_log(quiet=False, file=None)
    set_threads(threads)
    detector = MDMLDetector.load(model, "cpu")
    wanted = ({} if label is None else {label: None}) | detector.encoder_.types()
    table = None if data is None else read_wanted(data, wanted)
    if label is not None and (table is None or label not in table.column_names):
        raise InputError(f"--label: {'give DATA with it' if table is None else f'{data} has no column {label!r}'}")
    labels = None if label is None or table is None else class_names(table[label], f"label column {label!r}")
    write_report(detector, out, table, labels, model.name)
    if json:
        output.print_json({"out": str(out), "bytes": out.stat().st_size})
    else:
        typer.echo(f"the report is in {out}")
