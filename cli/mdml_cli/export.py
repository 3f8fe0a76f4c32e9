"""`mdml-fast export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mdml_cli import log, output
from mdml_cli.options import JsonOption


class FormatName(StrEnum):
    """The library's own `ExportFormat` lives behind an import that takes seconds."""

    ONNX = "onnx"
    TORCH = "torch"
    MLFLOW = "mlflow"


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder that train wrote.")],
    form: Annotated[
        FormatName,
        typer.Option(
            "--format",
            help="'onnx': one file from raw columns to score, p_value and is_anomaly; 'torch': a torch.export program "
            "of numbers and codes; 'mlflow': a folder for mlflow.pyfunc.load_model.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="Where to write: a file; for mlflow a folder.")],
    false_alarm_rate: Annotated[
        float | None, typer.Option(metavar="RATE", help="The share that alarms promise; the model's own: 0.01.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write the model in another format: preprocessing, score, p-value and alarm."""
    from mdml_fast.detector import MDMLDetector
    from mdml_fast.export import ExportFormat
    from mdml_fast.export import export as write

    detector = MDMLDetector.load(model, "cpu")
    if false_alarm_rate is not None:
        detector.set_params(false_alarm_rate=false_alarm_rate)
    detector.check_settings()
    write(detector, ExportFormat(form.value), out)
    for line in detector.attainable_notes():
        log.note(line)
    if json:
        output.print_json({"out": str(out), "format": form.value, "false_alarm_rate": detector.false_alarm_rate})
    else:
        typer.echo(f"wrote {out} ({form.value}), alarms at a rate of {detector.false_alarm_rate:g}")
