"""`mdml-fast evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mdml_cli import log, output
from mdml_cli.options import (
    DataArgument,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    GroupOption,
    IgnoreOption,
    JsonOption,
    LabelOption,
    LogFileOption,
    NormalOption,
    Preset,
    PresetOption,
    QuietOption,
    ThreadsOption,
    load_data,
    set_threads,
)


def evaluate(
    data: DataArgument = None,
    label: LabelOption = None,
    normal: NormalOption = None,
    ignore: IgnoreOption = None,
    group: GroupOption = None,
    shots: Annotated[int, typer.Option(min=1, metavar="N", help="Labelled rows of each seen class.")] = 10,
    splits: Annotated[int, typer.Option(min=1, metavar="N", help="Divisions into seen and unseen classes.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Draws of rows and models for each.")] = 3,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What to compare with: knn (the default), knn-clipped, isolation-forest, lof, extra-trees, "
            "boosted-trees, extra-trees-on-scores; where installed deepsad, devnet, prenet, rosas, ecod, copod; "
            "repeat for more, or 'all'.",
        ),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use about this many rows, the classes keeping their shares.")
    ] = None,
    preset: PresetOption = Preset.DEFAULT,
    device: DeviceOption = Device.AUTO,
    dtype: DtypeOption = Dtype.FLOAT32,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    log_file: LogFileOption = None,
    json: JsonOption = False,
) -> None:
    """Measure how well anomaly classes are found that were left out of training."""
    from mdml_fast.baselines import baseline as baseline_method
    from mdml_fast.baselines import installed_baselines, mdml
    from mdml_fast.evaluation import EvaluationProtocol
    from mdml_fast.evaluation import evaluate as run_evaluation

    log.open_log(quiet, log_file)
    set_threads(threads)
    methods = {"mdml": mdml(preset.value, device.value, dtype.value)}
    names = installed_baselines() if baseline == ["all"] else baseline or ["knn"]
    methods |= {name: baseline_method(name) for name in names}
    table = load_data(data, label, normal, ignore, group)
    if max_rows is not None and len(table) > max_rows:
        log.note(f"about {max_rows} of the {len(table)} rows are used, the classes keeping their shares")
    protocol = EvaluationProtocol(shots=shots, splits=splits, seeds=seeds, max_rows=max_rows)
    with log.progress("evaluating") as update:
        document = run_evaluation(table, methods, protocol, update)
    if json:
        output.print_json(document)
        return
    output.print_results(document["results"])
    output.print_differences(document["differences"])
    rows = document["data"]
    typer.echo(
        f"{rows['rows_used']} rows, {rows['normals']} normal, {len(rows['families'])} anomaly classes; "
        f"{splits} x {seeds} splits; {rows['dropped_duplicates']} test rows dropped that equal a training row"
    )
