"""Options that several commands share, and what they have in common to do with them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdml_cli import log

if TYPE_CHECKING:
    from mdml_fast.data import LabelledTable


class Preset(StrEnum):
    """The detector's algorithms."""

    DEFAULT = "default"
    PAPER = "paper"


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """What the networks compute in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class PromiseName(StrEnum):
    """What alarms keep to; the library's own `Promise` lives behind an import that takes seconds."""

    MARGINAL = "marginal"
    CERTIFICATE = "certificate"
    FDR = "fdr"


DataArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DATA]",
        show_default=False,
        help="A table: .parquet, .csv, .csv.gz, .arrow, .feather or .npz. Without it: the embedded digits, 0-4 normal.",
    ),
]
LabelOption = Annotated[str | None, typer.Option(metavar="COLUMN", help="The column of classes.")]
NormalOption = Annotated[
    list[str] | None, typer.Option(metavar="CLASS", help="A normal class; repeat for more, all that you know.")
]
IgnoreOption = Annotated[
    list[str] | None, typer.Option(metavar="COLUMN", help="A column that is no feature; repeat for more.")
]
GroupOption = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Normals that share a value here stay together in every split; no feature."),
]
PresetOption = Annotated[Preset, typer.Option(help="The algorithm; 'default' is the recommended one.")]
DeviceOption = Annotated[Device, typer.Option(help="'auto' takes a GPU where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="What the networks compute in; weights stay float32.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads; all cores by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", help="Nothing on standard error but why a command failed: no progress, no notes.")
]
LogFileOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Append progress, notes and errors here as JSON lines.")
]


def load_data(
    path: Path | None,
    label: str | None,
    normal: list[str] | None,
    ignore: list[str] | None,
    group: str | None,
    *,
    max_normals: int | None = None,
    seed: int = 0,
) -> LabelledTable:
    """The labelled table that the command line names, with a sample of its normals; without a path the digits.

    Raises:
        InputError: it cannot be read or used.
    """
    from mdml_fast.data import digits_table, label_table, read_table
    from mdml_fast.data.batches import open_table
    from mdml_fast.data.digits import DIGITS_LABEL, DIGITS_NORMAL
    from mdml_fast.data.reservoir import sample_table

    if path is None:
        return label_table(digits_table(), label or DIGITS_LABEL, normal or DIGITS_NORMAL, ignore or (), group)
    if label is None:
        with open_table(path, None, 1) as table:
            columns = ", ".join(table.names)
        raise typer.BadParameter(f"give --label, the column of classes; the columns are {columns}")
    if max_normals is None:
        return label_table(read_table(path), label, normal or (), ignore or (), group)
    with log.progress("reading", "rows") as update:
        data, n_normals = sample_table(
            path,
            label,
            normal or (),
            ignore or (),
            group,
            max_normals=max_normals,
            seed=seed,
            progress=lambda done, total: update(done, total, ""),
        )
    if n_normals > max_normals:
        n_anomalies = sum(data.anomaly_classes().values())
        log.note(f"{max_normals} of the {n_normals} normals are used, drawn at random, and all {n_anomalies} anomalies")
    return data


def set_threads(threads: int | None) -> None:
    """Bound the CPU threads of torch, and of what scikit-learn runs."""
    if threads is not None:
        import torch
        from threadpoolctl import threadpool_limits

        torch.set_num_threads(threads)
        threadpool_limits(threads)
