"""What reasons, ONNX and the report cost, on the model of one open set.

    MDML_DATA=FOLDER python benchmarks/outputs.py explain
    MDML_DATA=FOLDER python benchmarks/outputs.py onnx
    MDML_DATA=FOLDER python benchmarks/outputs.py report

- explain: `detector.explain` and its words for three reasons, against `score_samples`; on two threads.
- onnx: onnxruntime on the exported model, against `score_samples` with alarms, on the same rows; on one thread each.
- report: seconds of `mdml-fast report` on the whole set, and the bytes of the file; on two threads.

Ratios are the median over rounds in which both are timed one after the other. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from mdml_fast import MDMLDetector
from mdml_fast.data.labelled import LabelledTable
from mdml_fast.data.open_sets import open_sets

N_REASONS = 3
COMMAND = "import sys; from mdml_cli.app import run; sys.exit(run(sys.argv[1:]))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["explain", "onnx", "report"])
    parser.add_argument("--set", default="nsl_kdd")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    labelled = open_sets()[arguments.set]()
    threads = 1 if arguments.what == "onnx" else 2
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(threads):
        detector = MDMLDetector(random_state=0).fit(labelled.features, labelled.labels, normal=labelled.normal)
        rows = labelled.take(np.random.default_rng(0).permutation(len(labelled))[: arguments.rows])
        if arguments.what == "report":
            found = report(detector, labelled, Path(folder))
        else:
            measure = explain if arguments.what == "explain" else onnx
            found = measure(detector, rows, Path(folder), arguments.rounds)
    print(json.dumps({"what": arguments.what, "set": arguments.set, "threads": threads} | found, indent=1))


def explain(detector: MDMLDetector, rows: LabelledTable, folder: Path, rounds: int) -> dict[str, Any]:  # noqa: ARG001
    return compared(
        lambda: detector.explain(rows.features).why(N_REASONS), lambda: detector.score_samples(rows.features), rounds
    ) | {"rows": len(rows)}


def onnx(detector: MDMLDetector, rows: LabelledTable, folder: Path, rounds: int) -> dict[str, Any]:
    import onnxruntime

    from mdml_fast.export import ExportFormat, export
    from mdml_fast.export.onnx_model import onnx_inputs

    export(detector, ExportFormat.ONNX, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = onnx_inputs(detector.encoder_, rows.features)
    ours = detector.score_samples(rows.features)
    theirs = session.run(["score"], inputs)[0]
    return compared(lambda: session.run(None, inputs), lambda: detector.alarms(rows.features), rounds) | {
        "rows": len(rows),
        "largest_relative_difference": float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(ours), 1e-3))),
    }


def report(detector: MDMLDetector, labelled: LabelledTable, folder: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pa_parquet

    detector.save(folder / "model")
    pa_parquet.write_table(
        labelled.features.append_column("its class", pa.array(labelled.labels)), folder / "rows.parquet"
    )
    command = ["report", "model", "rows.parquet", "--label", "its class", "--out", "report.html", "--threads", "2"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", COMMAND, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": (folder / "report.html").stat().st_size, "rows": len(labelled)}


def compared(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Seconds of both, and the median ratio."""
    one(), other()
    seconds = np.array([[timed(one), timed(other)] for _ in range(rounds)])
    times, plain = np.median(seconds, axis=0).tolist()
    return {"seconds": times, "plain_seconds": plain, "ratio": float(np.median(seconds[:, 0] / seconds[:, 1]))}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
