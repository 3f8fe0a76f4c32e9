"""`mdml-fast train`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdml_cli import output
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
    NormalOption,
    Preset,
    PresetOption,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    json: JsonOption = False,
) -> None:
    """Learn from normals and labelled anomalies, and write a model.

    All labelled rows are learned from. How well unseen classes are found is measured beside that, with models that
    had each half of the anomaly classes left out in turn.
    """
    from mdml_fast.artifact import check_replaceable
    from mdml_fast.detector import MDMLDetector

    set_threads(threads)
    check_replaceable(out)
    table = load_data(data, label, normal, ignore, group)
    detector = MDMLDetector(preset.value, normal=table.normal, random_state=seed, device=device, dtype=dtype)
    checkpoint = out.with_name(f"{out.name}.checkpoint")

    start = time.perf_counter()
    with output.engine_log(), output.progress_bar("training") as update:
        detector.fit(
            table.features,
            table.labels,
            groups=table.groups,
            progress=lambda step, n_steps, loss: update(step, n_steps, f"loss {loss:.3f}"),
            checkpoint=checkpoint,
            resume=resume,
        )
    fit_seconds = time.perf_counter() - start
    for line in detector.notes_:
        output.note(f"note: {line}")

    check = _check(table, preset, device, dtype)
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
        output.note(f"note: the check of unseen classes takes {CHECK_ROWS} of the {len(table)} rows")
    # Two complementary splits: each class is left out once. All labelled rows count, as they do in training.
    protocol = EvaluationProtocol(shots=None, splits=2, seeds=1, max_rows=CHECK_ROWS)
    methods = {"mdml": mdml(preset.value, device.value, dtype.value), "knn": baseline("knn")}
    with output.progress_bar("checking unseen classes") as update:
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
