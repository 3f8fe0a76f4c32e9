"""`mdml-fast train`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from mdml_fast.data import LabelledTable

# The check after training fits twice more; on a large table it need not take all rows to tell how good the model is.
CHECK_ROWS = 20_000


def train(
    data: DataArgument = None,
    label: LabelOption = None,
    normal: NormalOption = None,
    ignore: IgnoreOption = None,
    group: GroupOption = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The model's folder.")] = Path("mdml-model"),
    preset: PresetOption = Preset.DEFAULT,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same weights.")] = 0,
    device: DeviceOption = Device.AUTO,
    dtype: DtypeOption = Dtype.FLOAT32,
    threads: ThreadsOption = None,
    max_normals: Annotated[
        int, typer.Option(min=20, metavar="N", help="Of more normals so many are drawn at random, and all anomalies.")
    ] = 200_000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the losses and the check there as TensorBoard events.")
    ] = None,
    quiet: QuietOption = False,
    log_file: LogFileOption = None,
    json: JsonOption = False,
) -> None:
    """Learn from normals and labelled anomalies, and write a model.

    All labelled rows are learned from. How well unseen classes are found is measured beside that, with models that
    had each half of the anomaly classes left out in turn.
    """
    from mdml_fast.artifact import check_replaceable
    from mdml_fast.detector import MDMLDetector
    from mdml_fast.errors import InputError

    log.open_log(quiet, log_file)
    set_threads(threads)
    check_replaceable(out)
    table = load_data(data, label, normal, ignore, group, max_normals=max_normals, seed=seed)
    detector = MDMLDetector(preset.value, normal=table.normal, random_state=seed, device=device, dtype=dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(f"{out.name}.checkpoint")

    start = time.perf_counter()
    with log.resumable("the training", checkpoint), log.curves(tensorboard) as curve:
        with log.engine_notes(), log.progress("training") as update:

            def progress(step: int, n_steps: int, loss: float) -> None:
                update(step, n_steps, f"loss {loss:.3f}")
                curve("training/loss", loss, step)

            detector.fit(
                table.features,
                table.labels,
                groups=table.groups,
                progress=progress,
                checkpoint=checkpoint,
                resume=resume,
            )
        fit_seconds = time.perf_counter() - start
        for line in detector.notes_:
            log.note(line)
        try:
            check = _check(table, preset, device, dtype)
        except InputError as error:  # the model is good for all that
            log.note(f"how well unseen classes are found is not measured: {error}")
            check = None
        for method, result in check["results"].items() if check else ():
            for side in ("unseen", "seen"):
                if (auroc := result[side]["auroc"]["mean"]) is not None:
                    curve(f"check/{side} AUROC/{method}", auroc, 0)
    detector.save(out, metrics=check["results"]["mdml"] if check else None)
    checkpoint.unlink(missing_ok=True)

    if json:
        output.print_json(_document(out, detector, table, fit_seconds, check))
        return
    if check:
        output.print_results(check["results"])
    typer.echo(f"trained in {fit_seconds:.1f} s on {len(table)} rows; the model is in {out}")


def _check(table: LabelledTable, preset: Preset, device: Device, dtype: Dtype) -> dict[str, Any] | None:
    """Ours and k-NN on classes left out of training; None where there is no anomaly class."""
    from mdml_fast.baselines import baseline, mdml
    from mdml_fast.evaluation import EvaluationProtocol, evaluate

    if not table.anomaly_classes():
        return None
    if len(table) > CHECK_ROWS:
        log.note(f"the check of unseen classes takes {CHECK_ROWS} of the {len(table)} rows")
    # Two complementary splits: each class is left out once. All labelled rows count, as they do in training.
    protocol = EvaluationProtocol(shots=None, splits=2, seeds=1, max_rows=CHECK_ROWS)
    methods = {"mdml": mdml(preset.value, device.value, dtype.value), "knn": baseline("knn")}
    with log.progress("checking unseen classes") as update:
        return evaluate(table, methods, protocol, update)


def _document(
    out: Path, detector: Any, table: LabelledTable, fit_seconds: float, check: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "model": str(out),
        "rows": len(table),
        "normal_classes": detector.normal_classes_,
        "anomaly_classes": detector.anomaly_classes_,
        "notes": detector.notes_,
        "fit_seconds": fit_seconds,
        "check": check,
    }
